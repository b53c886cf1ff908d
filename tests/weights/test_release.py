"""Tests of converting weights and configs of the release, against its reference arrays."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.config import schema
from madformer_jax.diffusion import losses
from madformer_jax.diffusion import schedule as schedules
from madformer_jax.errors import ConfigError
from madformer_jax.models import madformer
from madformer_jax.weights import release
from madformer_jax.weights.release_config import preset, release_args

VARIANTS = ("baseline", "clear_cond", "clear_clean", "denoising_mlp")


def relative(value, expected) -> float:
    return float(np.linalg.norm(np.asarray(value) - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, reference):
    file = reference(f"madformer_{request.param}.npz")
    c = preset(json.loads(str(file["meta"])))
    schema.validate(c)
    state_dict = {name.removeprefix("param/"): file[name] for name in file.files if name.startswith("param/")}
    return file, c, state_dict, release.from_release(state_dict, c)


def test_release_outputs_losses_and_gradients(variant):
    file, c, _, params = variant
    model, z, noise = madformer.build(c), jnp.asarray(file["clean"]), jnp.asarray(file["noise"])

    def loss(params):
        outputs = model.apply({"params": params}, z, *(jnp.asarray(file[name]) for name in ("noised", "t")))
        terms = losses.unweighted_terms(outputs, z, noise, None)
        return terms["image"] + 0.1 * terms["hidden"], (outputs, terms)

    (total, (outputs, terms)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert relative(outputs.image, file["noise_pred"]) < 1e-4
    assert relative(outputs.hidden, file["condition"]) < 1e-4
    assert relative(total, file["loss_total"]) < 1e-4
    assert relative(terms["image"], file["loss_image"]) < 1e-4
    assert relative(terms["hidden"], file["loss_hidden"]) < 1e-4
    if c.model.clean_stream:
        assert relative(outputs.clean, file["clean_tower"]) < 1e-4
        assert relative(terms["clean"], file["loss_clean_tower"]) < 1e-4

    norms = {name: float(file[f"gradnorm/{name}"]) for name in release.to_release(params, c)}
    largest = max(norms.values())
    grad_norms = {name: float(np.linalg.norm(g)) for name, g in release.to_release(grads, c).items()}
    for name, expected in norms.items():
        if "_list.0." in name and not c.model.clean_stream:
            continue  # copies of the noisy tower, for a tower that this variant never runs
        # A bias of the keys shifts all scores equally, so its gradient is rounding noise.
        assert grad_norms[name] == pytest.approx(expected, rel=1e-3, abs=1e-8 * largest), name


def test_noised_blocks_of_the_reference_are_ours(variant):
    file = variant[0]
    noisy = schedules.DEFAULT.add_noise(jnp.asarray(file["clean"]), jnp.asarray(file["noise"]), jnp.asarray(file["t"]))
    assert relative(noisy, file["noised"]) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"diff_depth": 4},
        {"diff_depth": 1},
        {"diff_depth": 3},
        {"ar_len": 9, "variant": "clear_cond"},
        {"ar_len": 1, "denoising_mlp": True},
        {"pre_downsample_block_size": 16},
        {"unet_block_out_channels": [16], "unet_num_layers_per_block": [1], "unet_transformer_layers_per_block": [1]}
        | {"block_size": 64},
        {"unet_block_out_channels": [8, 16, 24], "unet_num_layers_per_block": [1, 1, 1]}
        | {"unet_transformer_layers_per_block": [0, 1, 1], "block_size": 4},
    ],
)
def test_other_sizes_have_the_releases_names_and_come_back(reference, change):
    meta = json.loads(str(reference("madformer_baseline.npz")["meta"])) | change
    c = preset(meta)
    schema.validate(c)
    shapes = release.release_shapes(c)
    assert {name.split(".")[1] for name in shapes if name.startswith("blocks.")} == {"0", "1", "2", "3"}
    assert shapes["boi_block"] == (1, meta["block_size"], 64)
    rng = np.random.default_rng(0)
    state_dict = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    back = release.to_release(release.from_release(state_dict, c), c)
    assert back.keys() == state_dict.keys()
    for name, tensor in state_dict.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@pytest.mark.parametrize("change", [{"variant": "clear_cond"}, {"clear_cond": True}])
def test_without_the_condition_the_release_has_no_hidden_loss(reference, change):
    """Its code sets that loss to 0, whatever `lambda_hidden` is."""
    meta = json.loads(str(reference("madformer_baseline.npz")["meta"]))
    assert preset(meta).loss.hidden == 0.1
    assert preset(meta | change).loss.hidden == 0.0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"variant": "fast"}, "'fast'"),
        ({"unet_num_layers_per_block": [2, 1]}, "unequal"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "wide"}, "wide"),
        ({"unet_num_layers_per_block": 2}, "wrong value"),
        ({"ar_len": -1}, "wrong value"),
    ],
)
def test_release_arguments_that_do_not_fit_are_named(reference, change, word):
    meta = json.loads(str(reference("madformer_baseline.npz")["meta"])) | change
    with pytest.raises(ConfigError, match=word) as error:
        preset({name: value for name, value in meta.items() if value is not None})
    assert "\n" not in str(error.value)


def test_models_that_the_release_lacks_are_refused(variant):
    c = variant[1].copy_and_resolve_references()
    c.model.classes = 3
    with pytest.raises(ConfigError, match="classes"):
        release.from_release({}, c)


def test_the_stride_between_stages_does_not_matter_with_one_stage(reference):
    stage = {
        "unet_block_out_channels": [16],
        "unet_num_layers_per_block": [1],
        "unet_transformer_layers_per_block": [1],
    }
    c = preset(json.loads(str(reference("madformer_baseline.npz")["meta"])) | stage)
    c.model.unet_stride = 2
    assert release_args(c)["unet_block_out_channels"] == [16]


def test_a_noise_path_that_the_release_lacks_is_refused(reference):
    c = preset(json.loads(str(reference("madformer_baseline.npz")["meta"])))
    assert release_args(c)["depth"] == 4
    c.diffusion.path = "flow"
    with pytest.raises(ConfigError, match=r"cannot run this model: diffusion\.path='flow' \(release: 'ddpm'\)\."):
        release_args(c)
    with pytest.raises(ConfigError, match=r"model.rope='axial' \(release: 'release'\)"):
        release_args(schema.base())
