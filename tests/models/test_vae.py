"""The VAE against diffusers' AutoencoderKL, and its memory at full size."""

import json
import pathlib
import sys
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.config import schema
from madformer_jax.errors import ConfigError
from madformer_jax.models import vae
from madformer_jax.runtime import partitioning
from madformer_jax.sampling import codec as codecs
from madformer_jax.weights import state_dicts, vae_weights

REFERENCE = pathlib.Path(__file__).parent.parent / "reference"


def seeded(shapes, gain):
    """Returns the weights of the reference arrays, a function of each tensor's name and shape."""
    state = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        x = rng.standard_normal(shape)
        if len(shape) > 1:
            x *= np.sqrt(gain / np.prod(shape[1:]))
        else:
            x = 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
        state[name] = x.astype(np.float32)
    return state


def distance(x, reference):
    return np.linalg.norm(np.asarray(x) - reference) / np.linalg.norm(reference)


def codec_config(path, **settings):
    c = schema.base()
    c.codec.path = path
    c.codec.update(settings)
    return c


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def arrays():
    with np.load(REFERENCE / "sd_vae_small.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def small(arrays):
    model = vae_weights.from_config(json.loads(str(arrays["config"])))
    state = seeded(json.loads((REFERENCE / "sd_vae_small_state_dict.json").read_text()), 1.0)
    return model, state, vae_weights.from_diffusers_vae(state, model)


@pytest.mark.parametrize("form", ["sd", "sdxl", "sd3", "flux", "deep", "shallow"])
def test_each_form_equals_diffusers_from_its_folder(form, tmp_path, monkeypatch):
    """Posterior, scaled latents and images agree to 1e-5. The config takes scale and shift from config.json."""
    with np.load(REFERENCE / f"vae_{form}.npz") as file:
        reference = dict(file)
    state = {name.removeprefix("param/"): x for name, x in reference.items() if name.startswith("param/")}
    config = json.loads(str(reference["config"]))
    folder = write_folder(tmp_path / "vae", state, json.dumps(config))
    c = codec_config(folder, latent_channels=config["latent_channels"])
    c.codec.downsampling = 2 ** (len(config["block_out_channels"]) - 1)
    model, params = codecs.load_vae(c)
    mean, logvar = jax.jit(lambda x: vae.encode(model, params, x))(nhwc(reference["image"]))
    assert distance(mean, nhwc(reference["mean"])) < 1e-5
    assert distance(logvar, nhwc(reference["logvar"])) < 1e-5

    codec, latent = codecs.build(c), nhwc(reference["latent"])
    certain = {"mean": jnp.asarray(nhwc(reference["mean"])), "logvar": jnp.full(mean.shape, -60.0)}
    assert distance(codec.encode({}, certain, jax.random.key(0)), latent) < 1e-5
    assert distance(jax.jit(codec.decode)(codec.load(), latent), nhwc(reference["decoded"])) < 1e-5

    c.codec.latent_channels += 1
    with pytest.raises(
        ConfigError, match=f"latent_channels={c.codec.latent_channels}, but the VAE at .* has {mean.shape[3]}"
    ):
        codecs.build(c).load()


def test_chunked_attention_and_passes_change_nothing(arrays, small, monkeypatch):
    model, _, params = small
    z = nhwc(arrays["mean"])
    monkeypatch.setattr(vae, "MAX_ATTENTION_SCORES", 96 * 25)  # 25 of 96 queries: a remainder
    monkeypatch.setattr(vae, "MAX_PIXELS_PER_PASS", 1)  # one image
    decoded = jax.jit(lambda z: vae.decode(model, params, z))(z)
    assert distance(decoded, nhwc(arrays["decoded"])) < 1e-4
    mean, _ = jax.jit(lambda x: vae.encode(model, params, x))(nhwc(arrays["image"]))
    assert distance(mean, z) < 1e-4


def test_bfloat16_is_close_and_returns_float32(arrays, small):
    model, _, params = small
    half = model.clone(dtype=jnp.dtype("bfloat16"))
    decoded = jax.jit(lambda z: vae.decode(half, params, z))(nhwc(arrays["mean"]))
    assert decoded.dtype == jnp.float32
    assert 1e-4 < distance(decoded, nhwc(arrays["decoded"])) < 0.05


def test_sampling_follows_the_posterior():
    mean, logvar = jnp.full((200, 8, 8, 4), 3.0, jnp.float16), jnp.full((200, 8, 8, 4), -2.0, jnp.float16)
    z = vae.sample_posterior(mean, logvar, jax.random.key(0))
    assert z.dtype == jnp.float32
    assert abs(z.mean() - 3) < 0.01
    assert abs(z.std() - np.exp(-1)) < 0.01


def test_full_model_has_the_published_names_and_shapes():
    reference = json.loads((REFERENCE / "sd_vae_state_dict.json").read_text())
    model = vae_weights.from_config(reference["config"])
    assert vae_weights.shapes(model) == {name: tuple(shape) for name, shape in reference["shapes"].items()}
    assert model == vae.AutoencoderKL() == vae.typical_vae(4, 8)
    assert model.scaling_factor == reference["scaling_factor"]


def test_conversion_round_trip_keeps_every_bit(small):
    model, state, params = small
    back = vae_weights.to_diffusers_vae(params)
    assert back.keys() == state.keys() == vae_weights.shapes(model).keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor)


@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_names_of_the_attention_are_converted(small, as_convolution):
    model, state, params = small
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in state.items():
        for new_name, old_name in old_names.items():
            if f"attentions.0.{new_name}." in name:
                name = name.replace(new_name, old_name)
                tensor = tensor[..., None, None] if as_convolution and tensor.ndim == 2 else tensor
        old[name] = tensor
    assert old.keys() != state.keys()
    converted = vae_weights.from_diffusers_vae(old, model)
    assert jax.tree.all(jax.tree.map(np.array_equal, converted, params))


def test_error_names_all_wrong_tensors(small):
    model, state, _ = small
    wrong = dict(state)
    del wrong["quant_conv.bias"]
    wrong["decoder.conv_in.weight"] = wrong["decoder.conv_in.weight"][:, :3]
    wrong["loss.logvar"] = np.zeros(1)
    with pytest.raises(ConfigError) as error:
        vae_weights.from_diffusers_vae(wrong, model, "some.bin")
    for word in ("some.bin", "quant_conv.bias", "decoder.conv_in.weight", "(64, 3, 3, 3)", "loss.logvar"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "AutoencoderDC"),
        ("act_fn", "gelu"),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("up_block_types", ["UpDecoderBlock2D"] * 3),
        ("latents_mean", [0.0] * 16),
        ("block_out_channels", [4, 9]),
        ("block_out_channels", 8),
        ("layers_per_block", 0),
        ("latent_channels", "16"),
        ("use_quant_conv", 1),
        ("scaling_factor", -1.0),
        ("shift_factor", float("nan")),
    ],
)
def test_a_wrong_or_unsupported_field_is_named_in_one_line(field, value):
    with pytest.raises(ConfigError, match=f"^VAE config {field}=.* (must be|is not supported)") as error:
        vae_weights.from_config({"block_out_channels": [4, 4, 4, 4], "norm_num_groups": 2, field: value})
    assert "\n" not in str(error.value)


def test_decoding_1024_pixels_at_full_size_fits_8_gib():
    model = vae.AutoencoderKL()
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    z = jax.ShapeDtypeStruct((4, 128, 128, 4), jnp.float32)
    memory = jax.jit(lambda p, z: vae.decode(model, p, z)).lower(params, z).compile().memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert needed < 8 * 2**30


def test_sharded_batch_is_decoded_in_passes_without_moving_images(small, monkeypatch):
    model, _, params = small
    pixels = 2 * 3 * model.reduction**2
    monkeypatch.setattr(vae, "MAX_PIXELS_PER_PASS", 4 * pixels)
    mesh = partitioning.make_mesh(4, 1, -1)
    sharding = partitioning.batch_sharding(mesh)
    z = jax.device_put(np.random.default_rng(0).standard_normal((24, 2, 3, 4)).astype(np.float32), sharding)
    with partitioning.scope(mesh):
        program = jax.jit(lambda z: vae.decode(model, params, z)).lower(z).compile()
    text = program.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "f32[3,16,24,32]" in text  # 6 images on each of 4 devices, at most 4 in a pass: two passes of 3
    decoded = program(z)
    assert decoded.sharding.is_equivalent_to(sharding, 4)
    monkeypatch.setattr(vae, "MAX_PIXELS_PER_PASS", 24 * pixels)
    np.testing.assert_allclose(decoded, jax.jit(lambda z: vae.decode(model, params, z))(np.asarray(z)), atol=2e-5)


# Files


def write_folder(folder, state, config_json, name="diffusion_pytorch_model.safetensors"):
    folder.mkdir()
    (folder / "config.json").write_text(config_json)
    state_dicts.write_state_dict(folder / name, state)
    return str(folder)


def test_folder_and_its_orbax_copy_give_the_same_codec(tmp_path, arrays, small, monkeypatch):
    model, state, params = small
    folder = write_folder(tmp_path / "diffusers", state, str(arrays["config"]))
    vae_weights.save(str(tmp_path / "orbax"), folder)
    for path in (folder, str(tmp_path / "orbax")):
        loaded, loaded_params = vae_weights.load(path)
        assert loaded == model
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded_params, params))
    codec, key = codecs.build(codec_config(path)), jax.random.key(1)
    mean, logvar = (jnp.asarray(nhwc(arrays[name])) for name in ("mean", "logvar"))
    z = 0.18215 * vae.sample_posterior(mean, logvar, key)
    monkeypatch.setattr(codecs, "to_float", lambda image: image)  # the reference image does not have 8 bits
    image = {"image": nhwc(arrays["image"])}
    np.testing.assert_allclose(jax.jit(codec.encode)(codec.load(), image, key), z, atol=1e-5)
    np.testing.assert_allclose(codec.encode({}, {"mean": mean, "logvar": logvar}, key), z, atol=1e-6)
    decoded = jax.jit(codec.decode)(codec.load(), 0.18215 * mean)
    assert distance(decoded, nhwc(arrays["decoded"])) < 1e-4


def test_cached_latents_need_no_vae_and_are_scaled_by_the_config():
    codec = codecs.build(codec_config("/nowhere", scaling_factor=0.13025))
    cached = {"mean": jnp.ones((1, 8, 8, 4)), "logvar": jnp.full((1, 8, 8, 4), -30.0)}
    np.testing.assert_allclose(codec.encode({}, cached, jax.random.key(0)), 0.13025, rtol=1e-4)
    for use in (codec.load, lambda: codec.encode({}, {"image": jnp.ones((1, 8, 8, 3))}, jax.random.key(0))):
        with pytest.raises(ConfigError, match="/nowhere is neither a folder"):
            use()


def test_vae_with_another_scaling_factor_raises(tmp_path, arrays, small):
    _, state, _ = small
    text = json.dumps(json.loads(str(arrays["config"])) | {"scaling_factor": 0.13025})
    folder = write_folder(tmp_path / "vae", state, text)
    codecs.load_vae(codec_config(folder, scaling_factor=0.13025))
    with pytest.raises(ConfigError, match=r"scaling_factor=0\.18215, but the VAE .* has 0\.13025"):
        codecs.load_vae(codec_config(folder, scaling_factor=0.18215))


def test_torch_weights_in_a_folder(tmp_path, arrays, small):
    pytest.importorskip("torch")
    _, state, params = small
    folder = write_folder(tmp_path / "vae", state, str(arrays["config"]), "diffusion_pytorch_model.bin")
    assert jax.tree.all(jax.tree.map(np.array_equal, vae_weights.load(folder)[1], params))


def test_errors_of_a_folder_are_one_line(tmp_path, arrays, small):
    _, state, _ = small

    def error(path):
        with pytest.raises(ConfigError) as caught:
            vae_weights.load(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "config.codec.path is empty" in error("")
    assert "neither a folder" in error(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "config.json" in error(str(tmp_path / "empty"))

    folder = write_folder(tmp_path / "short", state, str(arrays["config"]))
    file = tmp_path / "short" / "diffusion_pytorch_model.safetensors"
    with file.open("r+b") as f:
        f.truncate(file.stat().st_size // 2)
    assert str(file) in error(folder)
    with pytest.raises(ConfigError):
        vae_weights.save(str(tmp_path / "out"), folder)
    assert not (tmp_path / "out").exists()

    (tmp_path / "short" / "config.json").write_text("{")
    assert "config.json" in error(folder)

    shallow = json.dumps({"block_out_channels": [32, 64], "norm_num_groups": 32})
    other = vae_weights.from_config(json.loads(shallow))
    zeros = {name: np.zeros(shape, np.float32) for name, shape in vae_weights.shapes(other).items()}
    folder = write_folder(tmp_path / "other", zeros, shallow)
    with pytest.raises(ConfigError, match="config.codec.downsampling=8, but the VAE .* has 2: set that"):
        codecs.load_vae(codec_config(folder))


def test_hub_id_with_and_without_a_reachable_hub(tmp_path, arrays, small, monkeypatch):
    _, state, params = small
    folder = write_folder(tmp_path / "vae", state, str(arrays["config"]))
    hub = types.ModuleType("huggingface_hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)

    requests = []

    def download(hub_id, file, revision):
        requests.append((hub_id, revision))
        return f"{folder}/{file}"

    hub.hf_hub_download = download
    assert jax.tree.all(jax.tree.map(np.array_equal, vae_weights.load("someone/a-vae")[1], params))
    vae_weights.load("someone/a-vae@31f26fd")
    assert dict.fromkeys(requests) == {("someone/a-vae", None): None, ("someone/a-vae", "31f26fd"): None}

    def unreachable(hub_id, file, revision):
        raise OSError("no route to host\nand much more")

    hub.hf_hub_download = unreachable
    with pytest.raises(ConfigError) as error:
        vae_weights.load("someone/a-vae")
    assert "\n" not in str(error.value)
    assert "'someone/a-vae'" in str(error.value)
    assert "no route to host" in str(error.value)

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="pip install huggingface_hub"):
        vae_weights.load("someone/a-vae")
