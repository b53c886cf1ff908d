"""The bound against entropies of Gaussian data, a sum over all steps, and formulas written here anew."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from madformer_jax.diffusion import schedule as schedules
from madformer_jax.evaluation import bits_per_dimension, held_out_losses, teacher_forcing
from madformer_jax.evaluation.held_out_images import HeldOutBatch, block_noise
from madformer_jax.evaluation.teacher_forcing import Levels, TeacherForcing
from madformer_jax.models import madformer
from madformer_jax.models.madformer import ModelOutputs
from madformer_jax.runtime import partitioning
from tests.small import random_params, small_config

ROWS = 500  # images of a batch
DRAWS = 10  # of each timestep in the sum over all steps
CORRELATION, DEVIATION = 0.8, 0.2  # of block i given block i - 1, and of its innovation


@pytest.fixture(scope="module")
def mesh():
    return partitioning.make_mesh(1, 1, 1, jax.devices()[:1])


def batch_of(z, rows=None):
    numbers = np.arange(len(z), dtype=np.int32)
    return HeldOutBatch(rows or len(z), numbers, jnp.asarray(numbers), jnp.asarray(z, jnp.float32), None, None, numbers)


def path_of(schedule):
    """(alpha, sigma) at any timestep; the log of the SNR of DDPM is linear between whole timesteps."""
    if not isinstance(schedule, schedules.DDPM):
        return schedule.alpha_sigma
    table = schedules.alphas_cumprod()
    logits = jnp.asarray(special.logit(table), jnp.float32)

    def alpha_sigma(t):
        logit = jnp.interp(t, jnp.arange(1000.0), logits)
        return jnp.sqrt(jax.nn.sigmoid(logit)), jnp.sqrt(jax.nn.sigmoid(-logit))

    return alpha_sigma


class Gaussian:
    """The optimal model of blocks of which each is CORRELATION times the one before plus white noise."""

    def __init__(self, prediction_type, schedule):
        self.config, self.alpha_sigma = SimpleNamespace(prediction_type=prediction_type), path_of(schedule)

    def apply(self, variables, z, noisy, t, tokens, lengths, *, terms, clean_t, order):
        alpha, sigma = (x[..., None, None] for x in self.alpha_sigma(t))
        mean = CORRELATION * jnp.concatenate([jnp.zeros_like(z[:, :1]), z[:, :-1]], axis=1)
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        x0 = mean + gain * (noisy - alpha * mean)
        noise = (noisy - alpha * x0) / sigma
        outputs = {"x0": x0, "eps": noise, "v": alpha * noise - sigma * x0}
        return ModelOutputs(outputs[self.config.prediction_type], None, None, None)


def gaussian_images(n, blocks, positions, channels):
    random, z = np.random.default_rng(0), []
    for _ in range(blocks):
        mean = CORRELATION * z[-1] if z else 0
        pixels = mean + DEVIATION * random.standard_normal((n, positions, channels))
        z.append(np.round((pixels + 1) * 127.5) / 127.5 - 1)
    return np.stack(z, axis=1)


@pytest.mark.parametrize(
    ("path", "prediction_type", "codec"),
    [("ddpm", "eps", "pixel"), ("flow", "x0", "pixel"), ("cosine", "v", "pixel"), ("flow", "x0", "external")],
)
def test_the_optimal_model_of_gaussian_data_has_their_entropy(mesh, path, prediction_type, codec):
    c = small_config()
    c.diffusion.path, c.codec.name = path, codec
    c.codec.downsampling, c.codec.latent_channels = 1, 3
    forward = TeacherForcing(c, Gaussian(prediction_type, schedules.make(path)), {}, mesh)
    batch = batch_of(gaussian_images(100, *forward.sizes.block_shape))
    with partitioning.scope(mesh):
        pilots = bits_per_dimension.run_pilot(forward, [batch])
        bounds = [bits_per_dimension.bounds_of(forward.schedule, pilots, starts) for starts in ([0], range(14))]
        values = [bits_per_dimension.measure_batch(forward, batch, x) for x in bounds]
    density = np.log2(DEVIATION * np.sqrt(2 * np.pi * np.e))
    entropy = density + (np.log2(255 / 2) if codec == "pixel" else 0)
    # The entropy of these very images, not of all.
    z = np.asarray(batch.z, np.float64)
    residual = z - CORRELATION * np.concatenate([0 * z[:, :1], z[:, :-1]], axis=1)
    entropy += 0.5 * np.log2(np.e) * (np.mean((residual / DEVIATION) ** 2) - 1)
    tolerance = 0.01 * abs(np.log2(255 / 2) + density)
    for bound, value in zip(bounds, values):  # whatever the start
        assert value["bits_per_dimension"].mean() == pytest.approx(entropy, abs=tolerance)
        if path == "ddpm":
            excess = np.mean([excess_of_steps(int(x.first.t)) for x in bound["bits_per_dimension_discrete"]])
            assert value["bits_per_dimension_discrete"].mean() == pytest.approx(entropy + excess, abs=tolerance)


def excess_of_steps(start):
    """Bits per dimension by which steps with the posterior's variance exceed the entropy of Gaussian data."""
    alpha_bar = schedules.alphas_cumprod()[start:]
    snr = alpha_bar / (1 - alpha_bar)
    posterior = 1 / (DEVIATION**-2 + snr)
    # r - 1 - log r for each ratio r of two SNRs
    return 0.5 * np.sum((snr[:-1] - snr[1:]) * posterior[1:] - np.log(posterior[1:] / posterior[:-1])) / np.log(2)


def test_the_decoder_sums_to_one_and_equals_the_normal_distribution():
    levels = np.arange(256) / 127.5 - 1
    for mean in (-1.3, -1.0, 0.1234, 0.99):
        nats = np.asarray(teacher_forcing.decoder_nats(jnp.asarray(levels, jnp.float32), mean, 0.01, True))
        edges = np.concatenate([[-np.inf], (levels[:-1] + levels[1:]) / 2, [np.inf]])
        expected = np.diff(stats.norm.cdf(edges, mean, 0.01))
        np.testing.assert_allclose(np.exp(-nats), expected, atol=2e-4)
        assert np.isfinite(nats).all()
    assert np.exp(-nats).sum() == pytest.approx(1, abs=1e-3)


def test_the_decoder_mixes_and_its_weights_are_found():
    random, mean = np.random.default_rng(0), 0.1
    narrow = random.random(30_000) < 0.75
    errors = np.where(narrow, 0.05, 0.4) * random.standard_normal(30_000)
    x0 = np.full((10, 1, 3000, 1), mean)
    nats, deviations, weights = bits_per_dimension._fit_mixture(x0 + errors.reshape(x0.shape), x0, False)
    assert weights.sum() == pytest.approx(1)
    assert weights[deviations < 0.1].sum() == pytest.approx(0.75, abs=0.05)
    density = stats.norm(0, [0.05, 0.4]).pdf(errors[:, None]) @ [0.75, 0.25]
    assert nats / 3000 == pytest.approx(-np.log(density).mean(), abs=0.03)


@pytest.fixture(scope="module")
def single(mesh):
    """A model of one block with random weights, and the same image many times, with other noise each time."""
    c = small_config(blocks=1, depth=1, diffusion_depth=1, unet_channels=(4,), unet_attention=(False,))
    c.data.image_size = 4
    model = madformer.build(c)
    forward = TeacherForcing(c, model, random_params(model), mesh)
    image = np.random.default_rng(0).integers(0, 256, forward.sizes.block_shape) / 127.5 - 1
    return forward, model, np.broadcast_to(image, (ROWS, *image.shape))


@pytest.mark.parametrize(("starts", "count"), [([0], 4), (range(14), 1)])
def test_the_estimate_equals_the_sum_over_all_steps(mesh, single, starts, count):
    """Both sides have noise of their own: they agree within three standard errors, each below 0.5 %.

    The standard error of the sum follows from the variance of each of its terms over DRAWS.
    """
    forward, _, z = single
    batches = [
        batch_of(z)._replace(numbers=(x := np.arange(ROWS, dtype=np.int32) + i * ROWS), device_numbers=jnp.asarray(x))
        for i in range(count)
    ]
    bits = z[0].size * np.log(2)
    with partitioning.scope(mesh):
        pilots = bits_per_dimension.run_pilot(forward, batches[:1])
        bound = bits_per_dimension.sum_bound(forward.schedule, pilots[0], starts)
        values = [bits_per_dimension.measure_batch(forward, x, {"bits_per_dimension": [bound] * 2}) for x in batches]
        decoder = bound.deviations, bound.weights
        first, shape = bound.first, (ROWS, len(bound.weights))
        x0 = forward.errors(
            batches[0], 99, Levels(*(np.full((ROWS, 1), x) for x in first)), zero_context_timestep=True
        ).x0
        decoder = forward.decoder(batches[0], x0, *(np.broadcast_to(x, shape) for x in decoder))
        squared = []  # of timestep 2 i and 2 i + 1 for i = 0 to 499
        for draw in range(DRAWS):
            for odd in (0, 1):
                t = 2 * np.arange(ROWS)[:, None] + odd
                levels = Levels(t, *forward.schedule.alpha_sigma(t))
                squared.append(
                    forward.errors(batches[0], 1000 + 2 * draw + odd, levels, zero_context_timestep=True).squared
                )
    squared = np.reshape(squared, (DRAWS, 2, ROWS)).transpose(0, 2, 1).reshape(DRAWS, -1)[:, int(first.t) + 1 :]
    alpha_bar = schedules.alphas_cumprod()[int(first.t) :]
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    # KL of two Gaussians with the variance of the posterior, whose means differ by the clean estimate.
    variance = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * betas
    terms = alpha_bar[:-1] * betas**2 / (1 - alpha_bar[1:]) ** 2 / (2 * variance) * squared / bits
    prior = 0.5 * np.sum(alpha_bar[-1] * (z[0] ** 2 - 1) - np.log(1 - alpha_bar[-1])) / bits
    expected = terms.mean(axis=0).sum() + prior + decoder.mean() / bits
    expected_variance = np.sum(terms.var(axis=0, ddof=1)) / DRAWS + np.var(decoder / bits, ddof=1) / ROWS
    estimate = np.concatenate([x["bits_per_dimension"] for x in values])
    errors = np.array([estimate.std(ddof=1) / len(estimate) ** 0.5, expected_variance**0.5])
    assert abs(estimate.mean() - expected) < 3 * np.hypot(*errors)
    assert (errors < 0.005 * expected).all()
    if starts == [0]:
        uniform = (999 * np.var(terms.mean(axis=0)) * 999 / bits_per_dimension.DRAWS) ** 0.5
        assert estimate.std() < 0.2 * uniform  # importance cuts the deviation


def pilot_of(schedule, **changes):
    """A pilot with a constant integrand down to the last timestep, and a constant decoder."""
    levels = zip(bits_per_dimension.start_levels(schedule), (0, *schedule.alpha_sigma(np.array([999]))))
    _, alpha, sigma = (np.append(*x) for x in levels)
    snr = (alpha / sigma) ** 2
    values = {"squared": 1 / snr, "size": 1 / snr, "decoder": 0 * snr, "deviations": 1 / snr[:, None] ** 0.5}
    values |= {"weights": np.ones((len(snr), 1))} | changes
    return bits_per_dimension.Pilot(np.log(snr), **values)


@pytest.mark.parametrize("start", [0, 3])
def test_weights_add_up_to_the_sum_and_the_integral(start):
    pilot = pilot_of(schedules.DEFAULT, size=np.random.default_rng(0).random(15))
    u = (np.arange(100_000) + 0.5) / 1e5
    alpha_bar = schedules.alphas_cumprod()
    bound = bits_per_dimension.sum_bound(schedules.DEFAULT, pilot, [start])
    snr = (alpha_bar / (1 - alpha_bar))[int(bound.first.t) :]
    levels, weights = bound.sample(u)
    expected = np.sum(0.5 * (snr[:-1] - snr[1:]) / (1 + snr[1:]))
    assert np.mean(weights * levels.sigma**2) == pytest.approx(expected, rel=1e-3)
    bound = bits_per_dimension.integral_bound(schedules.DEFAULT, pilot, [start])
    levels, weights = bound.sample(u)
    first = (bound.first.alpha / bound.first.sigma) ** 2
    assert first == pytest.approx(np.exp(pilot.log_snr[start]))
    expected = 0.5 * np.log((1 + first) / (1 + snr[-1]))  # of d SNR / (1 + SNR)
    assert np.mean(weights * levels.sigma**2) == pytest.approx(expected, rel=1e-3)


def test_more_starts_never_raise_the_bound_of_the_pilot():
    random = np.random.default_rng(0)
    for path in ("ddpm", "flow"):
        schedule = schedules.make(path)
        pilot = pilot_of(schedule, squared=np.sort(random.random(15)), decoder=random.normal(size=15))
        for make in (bits_per_dimension.integral_bound, bits_per_dimension.sum_bound)[: 1 + (path == "ddpm")]:
            each = [make(schedule, pilot, [k]).pilot_nats for k in range(14)]
            order = np.roll(np.argsort(each)[::-1], 3)  # the best is the third
            chosen = [make(schedule, pilot, order[: k + 1]).pilot_nats for k in range(14)]
            assert chosen == list(np.minimum.accumulate(np.array(each)[order]))
            assert chosen[-1] < chosen[0]


def test_one_block_has_the_plain_bound(mesh, single):
    """For L = 1 the bound is that of a diffusion model, with the noise and timesteps of the estimate."""
    forward, model, z = single
    batch = batch_of(z[:8])
    pilots, starts = [pilot_of(forward.schedule)] * 2, [3]
    with partitioning.scope(mesh):
        values = bits_per_dimension.measure_batch(
            forward, batch, bits_per_dimension.bounds_of(forward.schedule, pilots, starts)
        )
    alpha_bar, x, nats = schedules.alphas_cumprod(), z[:8], 0.0
    params = random_params(model)
    apply = jax.jit(lambda z, x, t: model.apply({"params": params}, z, x, t, clean_t=0 * t, terms=("image",)).image)
    log_snr = np.log(alpha_bar / (1 - alpha_bar))
    begin = 2 * np.log(12.5)

    def clean(level, draw):
        alpha, sigma = (np.sqrt(special.expit(s * level))[:, None, None, None] for s in (1, -1))
        noisy = alpha * x + sigma * np.asarray(block_noise(batch.device_numbers, draw, forward.sizes))
        t = np.interp(-level, -log_snr, np.arange(1000))
        given = jnp.asarray(noisy, jnp.float32), jnp.asarray(t, jnp.float32)[:, None]
        output = np.asarray(apply(0 * given[0], *given))
        return (noisy - sigma * output) / alpha

    for k in range(4):
        u = held_out_losses.low_discrepancy(4 * batch.numbers + k, 1, 300)[:, 0]
        level = begin + (log_snr[-1] - begin) * u
        squared = np.sum((x - clean(level, 300 + k)) ** 2, axis=(1, 2, 3))
        nats = nats + 0.25 * 0.5 * np.exp(level) * squared * (begin - log_snr[-1])
    estimate = clean(np.full(8, begin), 100)
    edges = [np.where(abs(x + side) < 1e-6, side * -np.inf, x - side / 255) for side in (1, -1)]  # lower, upper
    normal = stats.norm(estimate, 1 / 12.5)
    below, above = (  # of the bin's two ends, whichever tail has digits
        normal.logcdf(edges[1]) + np.log1p(-np.exp(normal.logcdf(edges[0]) - normal.logcdf(edges[1]))),
        normal.logsf(edges[0]) + np.log1p(-np.exp(normal.logsf(edges[1]) - normal.logsf(edges[0]))),
    )
    logs = np.where(x > estimate, above, below)
    prior = 0.5 * (alpha_bar[-1] * (x**2 - 1) - np.log(1 - alpha_bar[-1]))
    nats = nats + np.sum(prior - logs, axis=(1, 2, 3))
    np.testing.assert_allclose(values["bits_per_dimension"], nats / (x[0].size * np.log(2)), rtol=2e-3)


def test_images_are_scored_with_the_choice_of_the_others(mesh, single, monkeypatch):
    forward, _, z = single
    pilots = [pilot_of(forward.schedule, deviations=np.full((15, 1), x)) for x in (0.5, 2.0)]
    with partitioning.scope(mesh):

        def values(pilots):
            bounds = bits_per_dimension.bounds_of(forward.schedule, pilots, [5])
            return bits_per_dimension.measure_batch(forward, batch_of(z[:8]), bounds)["bits_per_dimension"]

        both, even, odd = values(pilots), values(pilots[:1] * 2), values(pilots[1:] * 2)
        np.testing.assert_allclose(both, np.where(np.arange(8) % 2, odd, even))
        assert np.abs(odd - even).min() > 0.1
        # The pilot for images with even numbers does not depend on them.
        monkeypatch.setattr(bits_per_dimension, "RATIOS", bits_per_dimension.RATIOS[4:6])
        changed = np.where(np.arange(8)[:, None, None, None] % 2, z[:8], 1.0)
        before, after = (bits_per_dimension.run_pilot(forward, [batch_of(x)]) for x in (z[:8], changed))
    assert all(np.array_equal(a, b) for a, b in zip(before[0], after[0]))
    assert (before[1].squared != after[1].squared).all()


@pytest.mark.parametrize("path", ["ddpm", "flow", "cosine"])
def test_paths_share_the_starts(path):
    levels = bits_per_dimension.start_levels(schedules.make(path))
    ratios = levels.alpha / levels.sigma
    np.testing.assert_allclose(ratios[1:], bits_per_dimension.RATIOS[1:])
    assert ratios[0] == pytest.approx(99.995 if path == "ddpm" else 100)
    assert (np.diff(levels.t) > 0).all() and 0 <= levels.t[0] < levels.t[-1] < 999
