"""Orders of the blocks: causality by rank, true positions, the cache, kept blocks and costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.config import block_orders, schema
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.cost import flops
from madformer_jax.diffusion import losses, own_context, sampler, schedule
from madformer_jax.errors import ConfigError
from madformer_jax.models import block_order
from madformer_jax.sampling import editing
from tests.cost.test_flops import abstract, wide, xla_flops
from tests.diffusion.test_sampler import without_cache
from tests.models.test_madformer import inputs
from tests.small import small, small_config

PLAIN = {"unet_channels": (4,), "unet_attention": (False,), "block_order": "random"}
ORDERS = np.array([[3, 0, 1, 2], [1, 2, 0, 3]])  # of two images


@pytest.fixture(scope="module")
def random_model():
    return small(**PLAIN, depth=2, diffusion_depth=1, unet_context=True, classes=3)


@pytest.fixture(scope="module")
def forward(random_model):
    model, _ = random_model
    return jax.jit(
        lambda params, *args, order: model.apply({"params": params}, *args, terms=("image",), order=order).image
    )


def test_changing_a_block_leaves_earlier_ranks_unchanged(random_model, forward):
    model, params = random_model
    z, *others = inputs(model)
    for j in (1, 2):
        before, after = (forward(params, x, *others, order=ORDERS) for x in (z, z.at[:, j].add(1.0)))
        np.testing.assert_array_equal(before[:, : j + 1], after[:, : j + 1])
        assert (jnp.abs(before - after).max(axis=(0, 2, 3))[j + 1 :] > 1e-6).all()


def test_orders_of_images_equal_one_order(random_model, forward):
    """Tables of each image give the numbers of a table of all images."""
    model, params = random_model
    args = inputs(model)
    several = forward(params, *args, order=ORDERS)
    for i, order in enumerate(ORDERS):
        np.testing.assert_allclose(several[i], forward(params, *args, order=order)[i], rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(several[0] - forward(params, *args, order=ORDERS[1])[0]).max()) > 1e-3


def test_positions_follow_the_place_of_a_block():
    """In a single layer, the last block does not depend on the order of those before its predecessor."""
    model, params = small(**PLAIN, depth=1, diffusion_depth=1, unet_context=True)
    z, noisy, t, _ = inputs(model)
    forward = jax.jit(lambda *args, order: model.apply({"params": params}, *args, terms=("image",), order=order).image)
    outputs = []
    for order in ([0, 3, 1, 2], [3, 0, 1, 2]):
        ranked = (block_order.to_generation_order(x, np.array(order)) for x in (z, noisy, t))
        outputs.append(forward(*ranked, order=np.array(order))[:, 3])
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)


def test_cached_sampling_equals_full_recomputation_in_any_order(random_model):
    """The first blocks of an image as given blocks lead to the same other blocks."""
    model, params = random_model
    noise = np.random.default_rng(2).standard_normal((2, *model.config.sizes.block_shape), np.float32)
    tokens = np.array([[2], [0]])
    settings = {"solver": "ddim", "spacing": "trailing", "steps": 2, "guidance": 2.0}

    class Ordered:
        config = model.config
        apply = functools.partial(model.apply, order=jnp.asarray(ORDERS))

    ranked = np.asarray(block_order.to_generation_order(jnp.asarray(noise), ORDERS))
    expected = without_cache(
        Ordered, params, ranked, tokens, None, None, path=losses.schedules.DEFAULT, **settings
    )  # fmt: skip
    draw = jax.jit(functools.partial(sampler.sample, model, **settings))
    cached = draw(params, noise, tokens, order=jnp.asarray(ORDERS))
    cached_ranks = np.asarray(block_order.to_generation_order(cached, ORDERS))
    error, size = (np.linalg.norm(x, axis=(2, 3)) for x in (cached_ranks - expected, expected))
    assert (error < 2e-5 * size).all()
    edited = draw(params, noise, tokens, order=jnp.asarray(ORDERS), kept_blocks=jnp.asarray(cached_ranks[:, :2]))
    edited = np.asarray(block_order.to_generation_order(edited, ORDERS))
    np.testing.assert_array_equal(edited[:, :2], cached_ranks[:, :2])
    assert (np.linalg.norm(edited - cached_ranks, axis=(2, 3)) < 2e-5 * size).all()


def test_training_draws_an_order_for_each_image_and_step():
    model, _ = small(**PLAIN, blocks=16, unet_stride=1)
    orders = [np.asarray(losses.training_order(model, jax.random.key(step), 5)) for step in (0, 0, 1)]
    np.testing.assert_array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(np.sort(orders[0]), np.tile(np.arange(16), (5, 1)))
    assert len(np.unique(np.concatenate(orders[1:]), axis=0)) == 10
    x = jax.random.normal(jax.random.key(0), (5, 16, 2))
    np.testing.assert_array_equal(
        block_order.to_raster_order(block_order.to_generation_order(x, orders[0]), orders[0]), x
    )
    first = np.asarray(block_order.move_to_front(jnp.asarray(orders[0]), jnp.array([7, 2])))
    for order, moved in zip(orders[0], first):
        np.testing.assert_array_equal(moved, [7, 2, *(place for place in order if place not in (7, 2))])


def test_flops_of_edits_and_of_rows_equal_the_count_of_xla():
    c = wide(blocks=4, block_order="random", block_shape="rows", unet_context=True)
    model, params, z, *_ = abstract(c)
    kept_blocks = jax.ShapeDtypeStruct((z.shape[0], 2, *z.shape[2:]), z.dtype)
    order = jax.ShapeDtypeStruct(z.shape[:2], jnp.int32)

    def draw(params, z, order, kept_blocks):
        settings = {"solver": "ddim", "spacing": "trailing", "steps": c.sample.steps, "unroll": True}
        return sampler.sample(model, params, z, order=order, kept_blocks=kept_blocks, **settings)

    count = flops.sampling(c, c.train.batch, kept_count=2)
    assert xla_flops(draw, params, z, order, kept_blocks) == pytest.approx(count.total, rel=0.02)

    def loss(params, z):
        return losses.training_loss(model, params, z, None, jax.random.key(0), losses.LossWeights(**c.loss))[0]

    assert xla_flops(jax.grad(loss), params, z) == pytest.approx(flops.training_step(c).total, rel=0.02)


def test_costs_of_edits_count_drawn_blocks_and_the_prefill():
    c = wide(blocks=4, depth=4)  # D = 1
    c.sample.steps = 5
    # Two blocks of condition 3 and evaluations 5, and three extensions of 4 layers.
    assert flops.model_passes(c, kept_count=2) == (2 * 8 + 3 * 4) / 16
    assert flops.model_passes_until(c, 2, 1, kept_count=2) == (3 + 1 + 2 * 4) / 16
    assert flops.nfe(c, kept_count=1) == 0.75 * flops.nfe(c)
    assert flops.image_cost(c, kept_count=0) == flops.image_cost(c)


def test_named_orders_and_rows():
    c = small_config(blocks=16, unet_stride=1)
    sizes = derive_sizes(c)
    assert block_orders.fixed_order("center_out", sizes).tolist()[:5] == [5, 6, 9, 10, 1]
    assert block_orders.fixed_order("reverse", sizes).tolist() == list(range(15, -1, -1))
    c.model.block_shape, c.model.blocks = "rows", 4
    sizes = schema.validate(c)
    assert (sizes.grid, sizes.columns, sizes.block_side, sizes.block_width, sizes.token_width) == (4, 1, 2, 8, 8)
    assert block_orders.fixed_order("center_out", sizes).tolist() == [1, 2, 0, 3]
    c.model.blocks = 3
    with pytest.raises(ConfigError, match="3 rows do not divide the 8 rows of the latent: use one of 1, 2, 4, 8"):
        schema.validate(c)


@pytest.mark.parametrize(
    ("trained", "asked", "message"),
    [
        ("random", "3,0,1", "has 3 of 4 blocks"),
        ("random", "3,0,1,4", "'4' is not a block: blocks have the numbers 0 to 3"),
        ("random", "3,0,1,1", "block 1 occurs twice"),
        ("random", "spiral", "is unknown: one of raster, reverse, center_out, random, or the 4 block numbers"),
        ("raster", "reverse", "config.model.block_order='raster' only. Train with config.model.block_order=random"),
        ("reverse", "random", "config.model.block_order='reverse' only"),
        ("reverse", "3,2,1,0", ""),
        ("random", "2,0,1,3", ""),
    ],
)
def test_wrong_orders_are_refused(trained, asked, message):
    c = small_config(block_order=trained)
    c.sample.block_order = asked
    if not message:
        schema.validate(c)
        return
    with pytest.raises(ConfigError, match=message) as error:
        schema.validate(c)
    assert "\n" not in str(error.value)


def test_the_order_of_a_model_in_other_words_is_that_of_the_model():
    """With `unet_context`, an explicit order would add the blocks on the right and below to the context."""
    c = small_config(unet_context=True)
    c.sample.block_order = "0,1,2,3"
    schema.validate(c)
    assert editing.sampler_arguments(c, jax.random.split(jax.random.key(0)), None)["order"] is None


def test_own_context_is_estimated_in_the_order_of_each_image(random_model):
    model, params = random_model
    z, _, _, tokens = inputs(model)
    own = own_context.OwnContext(params, 1.0, 500)

    @jax.jit
    def replace(order):
        return own_context.replace(model, own, z, tokens, None, jax.random.key(0), schedule.DEFAULT, order)

    several = replace(ORDERS)
    for i, order in enumerate(ORDERS):
        np.testing.assert_allclose(several[i], replace(order)[i], rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(several[0] - replace(ORDERS[1])[0]).max()) > 1e-3
