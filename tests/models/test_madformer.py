import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from madformer_jax.config.choices import LOSS_TERMS
from madformer_jax.diffusion import losses
from madformer_jax.models import madformer
from madformer_jax.models.transformer import Streams
from madformer_jax.ops import rope
from madformer_jax.runtime import partitioning
from tests.small import small

FLAT = {"depth": 2, "diffusion_depth": 1}  # one layer in each stage: no scan to compile
PLAIN = FLAT | {"unet_channels": (4,), "unet_attention": (False,)}  # with the smallest block U-Net


def inputs(model):
    shape = (2, *model.config.sizes.block_shape)
    keys = jax.random.split(jax.random.key(5), 3)
    z, noisy = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape)
    tokens = jnp.array([[1], [2]]) if model.config.vocabulary else None
    return z, noisy, jax.random.randint(keys[2], shape[:2], 0, 1000), tokens


def eps_of(model):
    """Returns a compiled function (params, z, noisy, t, tokens) -> predicted noise."""
    return jax.jit(lambda params, *args: model.apply({"params": params}, *args, terms=("image",)).image)


CAUSAL = {
    "all streams, layers in a scan": {"depth": 4, "diffusion_depth": 2},
    "release options, shared": {
        "rope": "release", "time_embedding": "raw", "clean_timestep": "noisy", "param_sets": "shared",
    },
    "no clean stream": {"classes": 3, "clean_stream": False},
    "block only, no condition": {"classes": 3, "diffusion_attention": "block", "ar_condition": False},
    "no clean stream, no condition": {"clean_stream": False, "ar_condition": False},
    "D = N": {"diffusion_depth": 2},
    "sixteen blocks, neighbours": {"blocks": 16, "unet_stride": 1, "classes": 3, "unet_context": True},
    "1 x 1 convolutions": {"unet_kernel": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSAL)
def test_changing_a_block_leaves_earlier_outputs_unchanged(name):
    model, params = small(**(FLAT | CAUSAL[name]))
    z, *others = inputs(model)
    forward, j = eps_of(model), 1
    before, after = forward(params, z, *others), forward(params, z.at[:, j].add(1.0), *others)
    np.testing.assert_array_equal(before[:, : j + 1], after[:, : j + 1])
    s = model.config.switches
    if s.ar_condition or (s.clean_stream and not s.block_only):  # otherwise no clean block is read
        assert all(float(jnp.abs(before[:, i] - after[:, i]).max()) > 1e-6 for i in range(j + 1, s.blocks))


def test_one_block_and_all_layers_is_plain_diffusion():
    """L = 1 and D = N: the output does not depend on clean blocks."""
    model, params = small(blocks=1, depth=2, diffusion_depth=2)
    z, *others = inputs(model)
    forward = eps_of(model)
    np.testing.assert_array_equal(forward(params, z, *others), forward(params, z + 1, *others))


def test_a_term_of_weight_0_adds_no_computation():
    model, params = small(**PLAIN)
    z, noisy, t, _ = inputs(model)

    def lowered_flops(loss):
        return jax.jit(loss).lower(params).cost_analysis()["flops"]

    def loss_flops(**weights):
        step = functools.partial(losses.training_loss, model, weights=losses.LossWeights(**weights))
        _, metrics = jax.eval_shape(lambda p: step(p, z, None, jax.random.key(0)), params)
        assert not any(f"loss_{name}" in metrics for name, weight in weights.items() if not weight)
        return lowered_flops(lambda p: step(p, z, None, jax.random.key(0))[0])

    def eps_alone(p):
        return jnp.mean((model.apply({"params": p}, z, noisy, t, terms=("image",)).image - noisy) ** 2)

    image, hidden, clean = loss_flops(hidden=0.0), loss_flops(hidden=0.1), loss_flops(hidden=0.0, clean=0.1)
    assert image < 1.01 * lowered_flops(eps_alone)  # 1 %: drawing the noise and the metrics
    assert min(hidden, clean) > 1.05 * image  # one upsampler pass each
    assert loss_flops(hidden=0.1, clean=0.1) > 1.05 * max(hidden, clean)


SUBSETS = {
    "text": {"classes": 3, "text_length": 3},
    "no condition": {"ar_condition": False, "hidden_from": "noisy"},
    "block only, D = N": {"diffusion_attention": "block", "diffusion_depth": 2},
}


@pytest.mark.parametrize("name", SUBSETS)
def test_outputs_do_not_depend_on_the_other_requested_terms(name):
    model, params = small(**(PLAIN | SUBSETS[name]))
    z, noisy, t, _ = inputs(model)
    tokens = jnp.array([[1, 0, 2], [2, 3, 1]]) if model.config.vocabulary else None
    fields = dict(zip(LOSS_TERMS, madformer.ModelOutputs._fields, strict=True))
    available = [term for term in LOSS_TERMS if term != "text" or model.config.vocabulary]

    @jax.jit
    def forward(params):
        def outputs(*terms):
            return model.apply({"params": params}, z, noisy, t, tokens, terms=terms)._asdict()

        return outputs(*LOSS_TERMS), {term: outputs(term) for term in available}

    together, alone = forward(params)
    assert {field for field, x in together.items() if x is not None} == {fields[term] for term in available}
    for term in available:
        field = fields[term]
        np.testing.assert_allclose(alone[term][field], together[field], rtol=1e-4, atol=1e-5)
        assert {f for f, x in alone[term].items() if x is not None} == {field}


def test_text_is_causal_and_padding_changes_nothing():
    """A token changes no earlier logits, and padding changes neither the loss nor the gradient."""
    model, params = small(**PLAIN, classes=5, text_length=4)
    z, noisy, t, _ = inputs(model)
    tokens, lengths = jnp.array([[1, 0, 2, 4], [2, 3, 1, 0]]), jnp.array([2, 4])

    @jax.jit
    def forward(params, tokens):
        def loss(params):
            outputs = model.apply({"params": params}, z, noisy, t, tokens, lengths, terms=("image", "text"))
            return sum(losses.unweighted_terms(outputs, z, noisy, tokens, lengths).values()), outputs

        return jax.value_and_grad(loss, has_aux=True)(params)

    ((loss, outputs), gradient), ((_, other), _) = forward(params, tokens), forward(params, tokens.at[1, 2].set(0))
    np.testing.assert_array_equal(outputs.text[1, :2], other.text[1, :2])
    assert (np.abs(outputs.text[1, 2:] - other.text[1, 2:]).max(axis=-1) > 1e-3).all()
    assert (jnp.abs(outputs.image[1] - other.image[1]).max(axis=(1, 2)) > 1e-6).all()
    (same, padded), same_gradient = forward(params, tokens.at[0, 2:].set(jnp.array([0, 3])))
    np.testing.assert_array_equal(outputs.image, padded.image)
    np.testing.assert_array_equal(outputs.text[0, :2], padded.text[0, :2])
    assert loss == same
    jax.tree.map(np.testing.assert_array_equal, gradient, same_gradient)


def test_one_token_without_padding_is_a_class():
    model, params = small(**PLAIN, classes=3)
    arguments = inputs(model)

    @jax.jit
    def both(params):
        apply = functools.partial(model.apply, {"params": params}, *arguments, terms=("image",))
        return apply().image, apply(jnp.ones(2, jnp.int32)).image

    np.testing.assert_allclose(*both(params), rtol=1e-5, atol=1e-6)


def stage_gradient(model, params):
    """Returns a function of parameters: the gradient of the diffusion layers, a loop over two and a last one."""
    sizes = model.config.sizes
    shape = (2, sizes.blocks, sizes.tokens, model.config.width)
    x, y = (jax.random.normal(jax.random.key(i), shape, model.config.dtype) for i in range(2))

    def stage(model, x, y):
        image = model._image_positions()
        return model.diffusion_layers(Streams(clean=x, pred=y), {"clean": image, "pred": image}, ("pred",)).pred

    def total(params):
        return jnp.sum(model.apply({"params": params}, x, y, method=stage).astype(jnp.float32) ** 2)

    return jax.grad(total)


def test_unrolling_and_rematerialization_change_no_gradient():
    results = []
    for changes in ({}, {"scan_unroll": 2, "remat": "dots"}, {"remat": "attention"}, {"remat": "full"}):
        model, params = small(depth=3, diffusion_depth=3, blocks=1, **changes)
        results.append(jax.jit(stage_gradient(model, params))(params)["diffusion_layers"])
    assert float(jnp.linalg.norm(results[0]["body"]["tower_pred"]["query"]["kernel"])) > 1e-3
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), results[0], other)


def test_images_in_one_row_of_the_tpu_kernel_do_not_attend_to_each_other():
    """Runs four images on two devices, two in a row each, with texts of different lengths."""
    changes = dict(PLAIN, classes=3, text_length=3)
    (model, params), (pallas_model, _) = small(**changes), small(**changes, attention="pallas")
    shape = (4, *model.config.sizes.block_shape)
    z, noisy = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    t, tokens = jnp.arange(16).reshape(4, 4) * 60, jnp.arange(12).reshape(4, 3) % 4
    args, lengths = (z, noisy, t, tokens), jnp.array([1, 3, 2, 3])
    expected = jax.jit(functools.partial(model.apply, terms=("image",)))({"params": params}, *args, lengths).image
    with partitioning.scope(partitioning.make_mesh(2, 1, 1, jax.devices()[:2])):
        outputs = jax.jit(functools.partial(pallas_model.apply, terms=("image",)))(
            {"params": params}, *args, lengths
        ).image
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close_to_float32():
    model, params = small(**FLAT)
    half, _ = small(**FLAT, dtype="bfloat16")
    full, short = (eps_of(m)(params, *inputs(model)) for m in (model, half))
    assert short.dtype == jnp.float32
    assert 0 < float(jnp.linalg.norm(full - short) / jnp.linalg.norm(full)) < 0.1


def test_parameters_are_float32_and_boxed_with_their_logical_axes():
    half, _ = small(classes=3, dtype="bfloat16")
    params = jax.eval_shape(functools.partial(madformer.init, half), jax.random.key(0))
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim
        assert leaf.value.dtype == jnp.float32


def test_axial_rope_rotates_pairs_and_release_rope_mixes_axes():
    rows, cols = rope.image_positions(grid=2, token_side=3, columns=2)
    x = jax.random.normal(jax.random.key(0), (4, 9, 16))
    axial, release = (rope.rotary_table(rows, cols, head_size=16, side=6, variant=v) for v in ("axial", "release"))
    pairs = jnp.square(x[..., :8]) + jnp.square(x[..., 8:])
    rotated = rope.apply_rope(x, axial)
    np.testing.assert_allclose(jnp.square(rotated[..., :8]) + jnp.square(rotated[..., 8:]), pairs, rtol=1e-4)
    frequencies = 100.0 ** -(np.linspace(0, 16, 4) / 16)
    angles = np.concatenate([rows[3, 2] * frequencies] * 2 + [cols[3, 2] * frequencies] * 2)
    y = np.asarray(x[3, 2])
    expected = y * np.cos(angles) + np.concatenate([-y[8:], y[:8]]) * np.sin(angles)
    np.testing.assert_allclose(rope.apply_rope(x, release)[3, 2], expected, rtol=1e-4, atol=1e-5)
