import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from madformer_jax.diffusion import losses
from madformer_jax.models import madformer, rope
from tests.test_generate import SWITCHES, small


def inputs(model):
    shape = (2, model.blocks, model.block_side**2, model.channels)
    keys = jax.random.split(jax.random.key(5), 3)
    z, noisy = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape)
    tokens = jnp.array([[1], [2]]) if model.classes else None
    return z, noisy, jax.random.randint(keys[2], shape[:2], 0, 1000), tokens


@pytest.mark.parametrize("name", [name for name in SWITCHES if not name.startswith("one block")])
def test_changing_a_block_leaves_earlier_outputs_alone(name):
    model, params = small(**SWITCHES[name])
    z, noisy, t, tokens = inputs(model)
    forward = jax.jit(lambda z: model.apply({"params": params}, z, noisy, t, tokens, terms=("image",)).eps)
    j = 1
    before, after = forward(z), forward(z.at[:, j].add(1.0))
    np.testing.assert_array_equal(before[:, : j + 1], after[:, : j + 1])
    moves = model.ar_condition or not model.block_only
    if moves:
        assert all(float(jnp.abs(before[:, i] - after[:, i]).max()) > 1e-6 for i in range(j + 1, model.blocks))


def test_one_block_and_all_layers_is_plain_diffusion():
    """L = 1, D = N: no clean block is read, so the noise alone decides."""
    model, params = small(**SWITCHES["one block"])
    z, noisy, t, _ = inputs(model)
    forward = jax.jit(lambda z: model.apply({"params": params}, z, noisy, t, terms=("image",)).eps)
    np.testing.assert_array_equal(forward(z), forward(z + 1))


def gradient_flops(model, params, terms):
    z, noisy, t, tokens = inputs(model)

    def total(params):
        outputs = model.apply({"params": params}, z, noisy, t, tokens, terms=terms)
        return sum(jnp.sum(x**2) for x in outputs if x is not None)

    return jax.jit(jax.grad(total)).lower(params).compile().cost_analysis()["flops"]


def test_a_term_of_weight_0_adds_no_computation():
    assert losses.Weights(hidden=0.0).terms == ("image",)
    model, params = small(scan_unroll=4)
    image, hidden, clean, everything = (
        gradient_flops(model, params, terms)
        for terms in (("image",), ("image", "hidden"), ("image", "clean"), ("image", "hidden", "clean"))
    )
    assert image < hidden < everything
    assert image < clean < everything
    upsampler = hidden - image
    assert upsampler > 0.05 * image


def test_weight_0_costs_what_the_program_without_the_term_costs():
    """Against a program that asks for every output and uses one: the compiler drops what that one does not need."""
    model, params = small(scan_unroll=4)
    z, noisy, t, _ = inputs(model)

    def flops(loss):
        return jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]

    def trained(weights):
        return flops(lambda p: losses.training_loss(model, p, z, None, jax.random.key(0), weights)[0])

    unused = flops(lambda p: jnp.mean((model.apply({"params": p}, z, noisy, t).eps - noisy) ** 2))
    off, on = trained(losses.Weights(hidden=0.0)), trained(losses.Weights(hidden=0.1))
    assert off < 1.01 * unused  # 1 %: drawing the noise and the metrics
    assert off < 0.97 * on
    z_key = jax.random.key(0)
    assert "loss_hidden" not in losses.training_loss(model, params, z, None, z_key, losses.Weights(hidden=0.0))[1]


SUBSETS = {
    "text": {"classes": 3, "text_length": 3},
    "no clean stream": {"clean_stream": False},
    "no condition": {"ar_condition": False, "hidden_from": "noisy"},
    "block only": {"diffusion_attention": "block"},
    "D = N": {"diffusion_depth": 4},
}


@pytest.mark.parametrize("name", SUBSETS)
def test_an_output_does_not_depend_on_which_others_are_asked_for(name):
    model, params = small(**SUBSETS[name])
    z, noisy, t, _ = inputs(model)
    tokens = jnp.array([[1, 0, 2], [2, 3, 1]]) if model.classes else None

    @jax.jit
    def forward(params):
        def outputs(*terms):
            return model.apply({"params": params}, z, noisy, t, tokens, terms=terms)._asdict()

        return outputs(*madformer.TERMS), {term: outputs(term) for term in madformer.TERMS}

    everything, alone = forward(params)
    given = {term for term, x in zip(madformer.TERMS, everything.values(), strict=True) if x is not None}
    assert given == {"image", "hidden"} | ({"clean"} if model.clean_stream else set()) | (
        {"text"} if model.classes else set()
    )
    for term, field in zip(madformer.TERMS, everything, strict=True):
        if term in given:
            np.testing.assert_allclose(alone[term][field], everything[field], rtol=1e-4, atol=1e-5)
        assert {f for f, x in alone[term].items() if x is not None} == ({field} if term in given else set())


def test_how_layers_are_run_changes_no_gradient():
    results = []
    for changes in ({}, {"scan_unroll": 2}, {"remat": "dots"}, {"remat": "full"}):
        model, params = small(**changes)
        z, noisy, t, _ = inputs(model)

        def total(params, model=model, z=z, noisy=noisy, t=t):
            return jnp.sum(model.apply({"params": params}, z, noisy, t, terms=("image", "hidden")).eps ** 2)

        results.append(jax.jit(jax.grad(total))(params))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), results[0], other)


def test_bfloat16_computes_what_float32_computes():
    model, params = small()
    half, _ = small(dtype="bfloat16")
    z, noisy, t, _ = inputs(model)
    full, short = (m.apply({"params": params}, z, noisy, t, terms=("image",)).eps for m in (model, half))
    assert short.dtype == jnp.float32
    fresh = jax.eval_shape(functools.partial(madformer.init, half), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    assert 0 < float(jnp.linalg.norm(full - short) / jnp.linalg.norm(full)) < 0.1


def test_parameters_are_boxed_with_their_logical_axes():
    model, _ = small(classes=3)
    params = jax.eval_shape(functools.partial(madformer.init, model), jax.random.key(0))
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim


def test_axial_rope_turns_pairs_and_the_release_mixes_axes():
    rows, cols = rope.image_positions(grid=2, token_side=3)
    assert rows[1, 0] == 0
    assert cols[1, 0] == 3
    assert rows[2, 5] == 4
    x = jax.random.normal(jax.random.key(0), (4, 9, 1, 16))
    axial, release = (rope.rotary(rows, cols, head_size=16, side=6, variant=v) for v in ("axial", "release"))
    pairs = jnp.square(x[..., :8]) + jnp.square(x[..., 8:])
    turned = rope.rotate(x, axial)
    np.testing.assert_allclose(jnp.square(turned[..., :8]) + jnp.square(turned[..., 8:]), pairs, rtol=1e-4)
    frequencies = 100.0 ** -(np.linspace(0, 16, 4) / 16)
    angles = np.concatenate([rows[3, 2] * frequencies] * 2 + [cols[3, 2] * frequencies] * 2)
    y = np.asarray(x[3, 2, 0])
    expected = y * np.cos(angles) + np.concatenate([-y[8:], y[:8]]) * np.sin(angles)
    np.testing.assert_allclose(rope.rotate(x, release)[3, 2, 0], expected, rtol=1e-4, atol=1e-5)
