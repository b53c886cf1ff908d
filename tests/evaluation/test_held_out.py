"""Losses on held-out images, scores by block, and --mode=evaluate with `held_out_n`."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.diffusion import losses, parameterization, sampler
from madformer_jax.diffusion import schedule as schedules
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import by_block, held_out_losses, held_out_scores, teacher_forcing
from madformer_jax.evaluation.held_out_images import HeldOutBatch, block_noise, generation_order
from madformer_jax.evaluation.teacher_forcing import Levels, TeacherForcing
from madformer_jax.models import block_order, madformer
from madformer_jax.modes import evaluate
from madformer_jax.runtime import partitioning
from madformer_jax.sampling import codec
from madformer_jax.sampling.opening import TrainedModel
from tests.modes import judged
from tests.small import random_params, small_config

data, workdir, fresh = judged.data, judged.workdir, judged.fresh


@pytest.fixture(autouse=True)
def _one_device(one_device):
    pass


@pytest.fixture(scope="module")
def small():
    c = small_config(classes=5, depth=2, diffusion_depth=1, unet_channels=(4,), unet_attention=(False,))
    c.loss.clean, c.loss.weighting = 0.1, "v"
    model = madformer.build(c)
    mesh = partitioning.make_mesh(1, 1, 1, jax.devices()[:1])
    return c, model, random_params(model), mesh


def batch_of(sizes, n, tokens):
    numbers = np.arange(n, dtype=np.int32)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(n, *sizes.block_shape)), jnp.float32)
    return HeldOutBatch(n, numbers, jnp.asarray(numbers), z, jnp.asarray(tokens), None, np.zeros(n))


def test_errors_are_the_terms_of_the_training_loss(small):
    c, model, params, mesh = small
    forward = TeacherForcing(c, model, params, mesh)
    batch = batch_of(forward.sizes, 2, [[1], [3]])
    t = np.array([[10, 300, 600, 990], [999, 0, 500, 20]])
    with partitioning.scope(mesh):
        errors = forward.errors(
            batch, 5, Levels(t, *schedules.DEFAULT.alpha_sigma(t)), terms=("image", "hidden", "clean")
        )
        noise = block_noise(batch.device_numbers, 5, forward.sizes)
        level = schedules.DEFAULT.level(jnp.asarray(t)[..., None, None])
        noisy = schedules.DEFAULT.add_noise(batch.z, noise, jnp.asarray(t))
        apply = jax.jit(functools.partial(model.apply, terms=("image", "hidden", "clean")))
        outputs = apply({"params": params}, batch.z, noisy, jnp.asarray(t), batch.tokens)
    target = parameterization.target(model.config.prediction_type, batch.z, noise, level)
    terms = losses.unweighted_terms(outputs, batch.z, target, None)
    scale = parameterization.loss_weight(model.config.prediction_type, "v", level)
    assert errors.image.mean() == pytest.approx(float(jnp.mean(scale * (outputs.image - target) ** 2)), rel=1e-4)
    assert errors.hidden.mean() == pytest.approx(float(terms["hidden"]), rel=1e-4)
    assert errors.clean[:, :-1].mean() == pytest.approx(float(terms["clean"]), rel=1e-4)


def test_errors_of_a_model_of_another_order_are_the_training_loss(small, monkeypatch):
    """Blocks, context and noise follow the order of the model, as in training."""
    c, _, params, mesh = small
    c = c.copy_and_resolve_references()
    c.model.block_order, c.loss.clean = "reverse", 0.0
    model, schedule, key = madformer.build(c), schedules.DEFAULT, jax.random.key(3)
    forward = TeacherForcing(c, model, params, mesh)
    batch = batch_of(forward.sizes, 2, [[1], [3]])
    order = generation_order(c, forward.sizes, batch.device_numbers)
    assert order.tolist() == [3, 2, 1, 0]
    t_key, noise_key = jax.random.split(key)
    t = np.asarray(schedule.training_timesteps(t_key, batch.z.shape[:2]))
    noise = block_order.to_raster_order(jax.random.normal(noise_key, batch.z.shape), order)  # in raster order
    monkeypatch.setattr(teacher_forcing, "block_noise", lambda *args: noise)
    levels = Levels(t, *schedule.alpha_sigma(t))
    with partitioning.scope(mesh):
        losses_of = jax.jit(losses.training_loss, static_argnums=(0, 5))
        _, trained = losses_of(model, params, batch.z, batch.tokens, key, losses.LossWeights(**c.loss))
        errors = forward.errors(batch._replace(order=order), 0, levels, terms=("image", "hidden"))
        raster = forward.errors(batch._replace(order=np.arange(4)), 0, levels, terms=("image", "hidden"))
    assert errors.image.mean() == pytest.approx(float(trained["loss_image"]), rel=1e-4)
    assert errors.hidden.mean() == pytest.approx(float(trained["loss_hidden"]), rel=1e-4)
    assert raster.image.mean() != pytest.approx(float(trained["loss_image"]), rel=1e-2)


def test_other_blocks_as_context_replace_the_true_ones(small):
    """Every block is predicted from the noised true block, after the given blocks in the order of the model."""
    c, _, params, mesh = small
    c = c.copy_and_resolve_references()
    c.model.block_order, c.loss.weighting = "reverse", "output"
    model, order = madformer.build(c), np.array([3, 2, 1, 0])
    forward = TeacherForcing(c, model, params, mesh)
    batch = batch_of(forward.sizes, 2, [[1], [3]])._replace(order=order)
    context, noise = batch.z[::-1], block_noise(batch.device_numbers, 5, forward.sizes)
    t = np.array([[10, 300, 600, 990], [999, 0, 500, 20]])
    levels = Levels(t, *schedules.DEFAULT.alpha_sigma(t))
    with partitioning.scope(mesh):
        after_true, after_other = (forward.errors(batch, 5, levels, context=x).image for x in (None, context))
        noisy = schedules.DEFAULT.add_noise(batch.z[:, order], noise[:, order], jnp.asarray(t))
        apply = jax.jit(functools.partial(model.apply, terms=("image",)))
        output = apply({"params": params}, context[:, order], noisy, jnp.asarray(t), batch.tokens).image
    level = schedules.DEFAULT.level(jnp.asarray(t)[..., None, None])
    target = parameterization.target(model.config.prediction_type, batch.z[:, order], noise[:, order], level)
    np.testing.assert_allclose(after_other, np.mean((output - target) ** 2, axis=(2, 3)), rtol=1e-4)
    np.testing.assert_allclose(after_other[:, 0], after_true[:, 0], rtol=1e-4)  # the first block has no context
    assert np.abs(after_other[:, 1:] / after_true[:, 1:] - 1).max() > 1e-3


def test_the_loss_weighs_each_blocks_quarters_by_their_share(small, monkeypatch):
    """Block b is in quarter (d + b) mod 4 in draw d. With a shifted path, quarters have unequal shares."""
    c, _, params, mesh = small
    c = c.copy_and_resolve_references()
    c.diffusion.path, c.diffusion.time_sampling, c.diffusion.shift = "flow", "logit_normal", 3.0
    forward = TeacherForcing(c, madformer.build(c), params, mesh)
    batch = batch_of(forward.sizes, 3, [[1], [3], [2]])
    monkeypatch.setattr(
        TeacherForcing, "errors",
        lambda self, batch, draw, levels, **_: SimpleNamespace(image=np.arange(1, 5) * (levels.t // 250 + 1), hidden=None),
    )  # fmt: skip
    values = held_out_losses.measure_batch(forward, batch, ("image",))
    shares = held_out_losses.quarter_shares(forward.schedule)
    assert shares.max() > 2 * shares.min()
    expected = np.arange(1, 5) * (shares @ np.arange(1, 5))
    np.testing.assert_allclose(values["blocks_loss_image"], np.tile(expected, (3, 1)))
    np.testing.assert_allclose(values["loss_image"], expected.mean())
    np.testing.assert_allclose(values["loss_q2"], 2 * 2.5)


def test_images_of_a_random_order_have_orders_of_their_own(small):
    c, *_ = small
    c, numbers = c.copy_and_resolve_references(), jnp.arange(20)
    sizes = madformer.derive_sizes(c)
    assert generation_order(c, sizes, numbers) is None
    c.model.block_order = "random"
    orders = np.asarray(generation_order(c, sizes, numbers))
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(4), (20, 1)))
    assert len(np.unique(orders, axis=0)) > 5
    c.sample.block_order = "raster"  # the places of the blocks are needed
    assert generation_order(c, sizes, numbers).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("diffusion", [("ddpm", "uniform", 1.0), ("flow", "logit_normal", 3.0)])
def test_timesteps_cover_the_quarters_and_follow_the_training(diffusion):
    schedule, numbers = schedules.make(*diffusion), np.arange(400)
    t = np.stack([held_out_losses.timesteps(schedule, numbers, 4, draw).t for draw in range(4)])
    assert (np.sort(t // 250, axis=0) == np.arange(4)[:, None, None]).all()
    shares = held_out_losses.quarter_shares(schedule)
    trained = np.asarray(schedule.training_timesteps(jax.random.key(0), (100_000,)))
    np.testing.assert_allclose(shares, np.histogram(trained, 4, (0, 1000))[0] / len(trained), atol=0.01)
    mean = np.sum(shares * [t[t // 250 == q].mean() for q in range(4)])
    assert mean == pytest.approx(trained.mean(), rel=0.01)


def test_noise_is_the_same_for_any_number_of_blocks():
    numbers = jnp.arange(3)
    sizes = [madformer.derive_sizes(small_config(blocks=blocks)) for blocks in (1, 4)]
    one, four = (np.asarray(codec.from_blocks(block_noise(numbers, 2, s), s)) for s in sizes)
    np.testing.assert_array_equal(one, four)
    assert np.abs(one[0] - one[1]).max() > 1


def test_blocks_sampled_given_the_sample_are_the_sample(small):
    """The forward pass of training, with the model's own blocks as context, repeats cached sampling."""
    c, _, params, mesh = small
    c, order = c.copy_and_resolve_references(), np.array([3, 2, 1, 0])
    c.model.block_order = "reverse"
    model = madformer.build(c)
    c.sample.steps, c.sample.solver, c.sample.spacing = 2, "ddim", "trailing"
    numbers, tokens = jnp.arange(2), jnp.asarray([[1], [4]])
    sizes = madformer.derive_sizes(c)
    with partitioning.scope(mesh):
        noise = block_noise(numbers, by_block._NOISE_DRAW, sizes)
        draw = jax.jit(functools.partial(sampler.sample, model, solver="ddim", spacing="trailing", steps=2))
        own = draw(params, noise, tokens)
        sample_blocks = by_block._make_block_sampler(c, SimpleNamespace(network=model, mesh=mesh))
        np.testing.assert_allclose(
            sample_blocks(params, own, numbers, tokens, None, order), own[:, order], atol=2e-3 * np.abs(own).max()
        )
        other = sample_blocks(params, own[::-1], numbers, tokens, None, order)[:, order]
    np.testing.assert_allclose(other[:, -1], own[:, -1], atol=2e-3 * np.abs(own).max())  # has no context
    assert np.abs(other[:, :-1] - own[:, :-1]).max() > 0.01


def test_a_run_of_several_checkpoints_has_means_with_ranges():
    results = [
        {"scores": {"bits": {"value": x, "n": 9}}, "blocks": [{"block": 1, "loss": {"own": {"value": 2 * x}}}]}
        for x in (1.0, 4.0)
    ]
    assert held_out_scores.run_entries(results) == {
        "held_out": {"bits": {"value": 2.5, "low": 1.0, "high": 4.0}},
        "held_out_blocks": [{"block": 1, "loss": {"own": {"value": 5.0, "low": 2.0, "high": 8.0}}}],
    }
    assert held_out_scores.run_entries([{"scores": results[0]["scores"]}]) == {"held_out": results[0]["scores"]}


def test_held_out_scores_are_those_of_the_sampled_depth(small):
    c, model, params, mesh = small
    c = c.copy_and_resolve_references()
    c.train.elastic_depth, c.train.elastic_depths, c.evaluate.grid = True, (1, 2), "steps=3,5;diffusion_depth=2,1"
    settings = held_out_scores._settings(c)
    assert [(x.sample.diffusion_depth, x.sample.steps) for x in settings] == [(1, 3), (2, 3)]
    trained = TrainedModel(mesh, model, params, None, {}, 7, 7)
    same, other = (trained.with_depth(x.sample.diffusion_depth) for x in settings)
    assert same is trained
    assert other.network.config.diffusion_depth == 2 and "ar_layers" not in other.params
    protocols = []
    for x, noise in zip((c, *settings, c), (0, 0, 0, 9)):
        x.evaluate.by_block, x.sample.context_noise = True, noise
        protocols.append(held_out_scores._protocol(x, trained, None, SimpleNamespace(protocol={})))
    assert [x.get("diffusion_depth") for x in protocols[:3]] == [None, 1, 2]
    assert protocols[3]["by_block"] == protocols[0]["by_block"] | {"context_noise": 9, "of": "all contexts"}
    assert held_out_scores._label(protocols[2]) == "7, ema, D = 2"


def test_each_order_of_a_grid_has_held_out_scores_of_its_own(small):
    c, *_ = small
    c = c.copy_and_resolve_references()
    c.model.block_order, c.evaluate.grid = "random", "block_order=raster,reverse,random;steps=3,5"
    settings = held_out_scores._settings(c)
    assert [(x.sample.block_order, x.sample.steps) for x in settings] == [("random", 3), ("raster", 3), ("reverse", 3)]
    c.evaluate.by_block = True
    with pytest.raises(ConfigError, match="by_block=True needs one order of blocks"):
        held_out_scores.open_images(c)
    label = held_out_scores._label({"step": 7, "weights": "ema", "ema": 0.05, "block_order": "reverse"})
    assert label == "7, ema, EMA width = 0.05, order = reverse"


def test_another_image_has_the_same_label():
    labels = np.array([0, 1, 0, 2, 1, 0])
    other = by_block.other_of_label(labels)
    assert (labels[other] == labels).all()
    assert other.tolist() == [2, 4, 5, 3, 1, 0]


def test_an_image_of_a_label_of_its_own_has_no_exposure_bias(monkeypatch):
    """Its own blocks are no context of another image: they would lower the loss under "other"."""
    other, warnings = by_block.other_of_label(np.array([0, 1, 0, 2])), []
    monkeypatch.setattr(by_block.logging, "warning", lambda text, *args: warnings.append(text % args))
    has_other = by_block._check_others(other)
    assert has_other.tolist() == [True, False, True, False] and "2 of 4 held-out images" in warnings[0]
    true, random = np.full((4, 2), 0.1), np.random.default_rng(0)
    real, sampled = random.normal(size=(2, 4, 2, 3))
    losses_of = {"other": np.where(has_other[:, None], 0.3, true), "own": np.full((4, 2), 0.4)}
    (_, row) = by_block.table({
        "blocks_loss_image": true, **{f"blocks_loss_{name}": x for name, x in losses_of.items()}, "blocks_bits": true,
        "real": real, "sampled_true": sampled, "sampled_own": sampled, "has_other": has_other.astype(np.int8),
    })  # fmt: skip
    assert row["loss"]["other"]["value"] == pytest.approx(0.3) and row["loss"]["own"]["n"] == 4
    assert row["exposure_bias"]["value"] == pytest.approx(0.1) and row["exposure_bias"]["n"] == 2
    with pytest.raises(ConfigError, match="3 images have none: set a larger config.evaluate.held_out_n"):
        by_block._check_others(np.arange(3))


def test_evaluate_gives_held_out_scores_once_and_their_paired_differences(fresh, workdir, monkeypatch, capsys):
    fresh.evaluate.n, fresh.evaluate.held_out_n, fresh.evaluate.by_block = 0, 9, True
    fresh.evaluate.checkpoints = "last:2"
    fresh.sample.batch = 4  # several batches, the last one not full
    results = evaluate.run(fresh, str(workdir))["held_out"]
    assert "bits_per_dimension" in capsys.readouterr().out
    files = sorted((workdir / "evaluations" / "held_out").glob("*.json"))
    assert len(files) == 2 and len(results) == 2
    for result in results:
        scores = result["scores"]
        assert scores.keys() >= {"bits_per_dimension", "bits_per_dimension_discrete", "held_out_loss_hidden"}
        quarters = [scores[f"held_out_loss_q{q}"]["value"] for q in (1, 2, 3, 4)]
        assert scores["held_out_loss_image"]["value"] == pytest.approx(np.mean(quarters))
        assert all(x["low"] <= x["value"] <= x["high"] and x["n"] == 9 for x in scores.values())
        (block,) = result["blocks"]
        assert block["exposure_bias"]["value"] == 0  # a single block has no context
        assert block["loss"]["true"] == scores["held_out_loss_image"] == block["loss"]["own"]
        assert result["protocol"]["space"] == "8-bit pixels"
    monkeypatch.setattr(held_out_scores, "_measure", lambda *a: pytest.fail("measured again"))
    assert evaluate.run(fresh, str(workdir))["held_out"] == results
    difference = held_out_scores.paired_differences(*map(str, files))["bits_per_dimension"]["value"]
    values = [json.loads(file.read_text())["scores"]["bits_per_dimension"]["value"] for file in files]
    assert difference == pytest.approx(values[0] - values[1])
    changed = json.loads(files[0].read_text())
    changed["protocol"]["blocks"] = 16
    files[0].write_text(json.dumps(changed))
    names = held_out_scores.paired_differences(*map(str, files)).keys()
    assert names == {"bits_per_dimension", "bits_per_dimension_discrete"}  # the losses have other targets
    changed["protocol"]["images"]["n"] = 8
    files[0].write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="different images are not paired"):
        held_out_scores.paired_differences(*map(str, files))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out_n": 500}, "500 held-out images are too many: split 'test' has"),
        ({"held_out_n": 1}, "at least 2 images"),
        ({"by_block": True, "n": 1}, "1 held-out image is too few"),
        ({"held_out_n": 5, "split": "train"}, "is the split of training"),
        ({"held_out_n": 5, "images": "data:test"}, "names existing images"),
        ({"by_block": True, "grid": "steps_by_block=4/3/2/1"}, "by_block=True samples all blocks with the same steps"),
        ({"n": 0}, "n=0 draws no samples"),
        ({"n": 0, "held_out_n": 5, "grid": "steps=1,2"}, "grid and sweeps need some"),
    ],
)
def test_wrong_settings_end_before_work(fresh, workdir, changes, message):
    fresh.evaluate.update(changes)
    fresh.model.blocks = 4
    with pytest.raises(ConfigError, match=message):
        evaluate.run(fresh, str(workdir))
