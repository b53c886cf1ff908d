import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from madformer_jax.diffusion import losses
from madformer_jax.models import madformer, rope
from tests.diffusion.test_sampler import SWITCHES
from tests.small import small


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
    if model.ar_condition or (model.clean_stream and not model.block_only):  # else no clean block is read
        assert all(float(jnp.abs(before[:, i] - after[:, i]).max()) > 1e-6 for i in range(j + 1, model.blocks))


def test_one_block_and_all_layers_is_plain_diffusion():
    """L = 1, D = N: no clean block is read, so the noise alone decides."""
    model, params = small(**SWITCHES["one block"])
    z, noisy, t, _ = inputs(model)
    forward = jax.jit(lambda z: model.apply({"params": params}, z, noisy, t, terms=("image",)).eps)
    np.testing.assert_array_equal(forward(z), forward(z + 1))


def test_a_term_of_weight_0_adds_no_computation():
    model, params = small(scan_unroll=4)
    z, noisy, t, _ = inputs(model)

    def lowered_flops(loss):
        return jax.jit(jax.grad(loss)).lower(params).cost_analysis()["flops"]

    def trained(**weights):
        step = functools.partial(losses.training_loss, model, weights=losses.Weights(**weights))
        _, metrics = jax.eval_shape(lambda p: step(p, z, None, jax.random.key(0)), params)
        assert not any(f"loss_{name}" in metrics for name, weight in weights.items() if not weight)
        return lowered_flops(lambda p: step(p, z, None, jax.random.key(0))[0])

    def eps_alone(p):
        return jnp.mean((model.apply({"params": p}, z, noisy, t, terms=("image",)).eps - noisy) ** 2)

    image, hidden, clean = trained(hidden=0.0), trained(hidden=0.1), trained(hidden=0.0, clean=0.1)
    assert image < 1.01 * lowered_flops(eps_alone)  # 1 %: drawing the noise and the metrics
    assert min(hidden, clean) > 1.05 * image  # an upsampler pass each
    assert trained(hidden=0.1, clean=0.1) > 1.05 * max(hidden, clean)


SUBSETS = {
    "text": {"classes": 3, "text_length": 3},
    "no condition": {"ar_condition": False, "hidden_from": "noisy", "depth": 3},
    "block only, D = N": {"diffusion_attention": "block", "diffusion_depth": 3, "depth": 3},
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
    fields = madformer.Outputs._fields  # in the order of TERMS
    given = {term for term, field in zip(madformer.TERMS, fields, strict=True) if everything[field] is not None}
    assert given == {"image", "hidden"} | ({"clean"} if model.clean_stream else set()) | (
        {"text"} if model.classes else set()
    )
    for term, field in zip(madformer.TERMS, fields, strict=True):
        if term in given:
            np.testing.assert_allclose(alone[term][field], everything[field], rtol=1e-4, atol=1e-5)
        assert {f for f, x in alone[term].items() if x is not None} == ({field} if term in given else set())


def test_how_layers_are_run_changes_no_gradient():
    results = []
    for changes in ({}, {"scan_unroll": 2, "remat": "dots"}, {"remat": "full"}):
        model, params = small(depth=3, diffusion_depth=3, **changes)  # a scan over two layers, and one alone
        z, noisy, t, _ = inputs(model)

        def total(params, model=model, z=z, noisy=noisy, t=t):
            return jnp.sum(model.apply({"params": params}, z, noisy, t, terms=("image",)).eps ** 2)

        results.append(jax.jit(jax.grad(total))(params))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), results[0], other)


def test_bfloat16_computes_what_float32_computes():
    model, params = small()
    half, _ = small(dtype="bfloat16")
    z, noisy, t, _ = inputs(model)
    full, short = (
        jax.jit(functools.partial(m.apply, terms=("image",)))({"params": params}, z, noisy, t).eps
        for m in (model, half)
    )
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
