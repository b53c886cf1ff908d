"""The bound against entropies of Gaussian data, a sum over all steps, and formulas written here anew."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from madformer_jax.config import schema
from madformer_jax.diffusion import schedule as schedules
from madformer_jax.evaluation import bits_per_dimension, held_out_losses, teacher_forcing
from madformer_jax.evaluation.held_out_images import HeldOutBatch, block_noise
from madformer_jax.evaluation.teacher_forcing import Levels, TeacherForcing
from madformer_jax.models import madformer
from madformer_jax.models.madformer import ModelOutputs
from madformer_jax.runtime import partitioning
from tests.small import random_params, small_config

ROWS = 125  # images of a batch; 8 batches have 1,000 rows
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

    def apply(self, variables, z, noisy, t, tokens, lengths, *, terms, clean_t):
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
        values = bits_per_dimension.measure(forward, lambda n: [batch])
    density = np.log2(DEVIATION * np.sqrt(2 * np.pi * np.e))
    entropy = density + (np.log2(255 / 2) if codec == "pixel" else 0)
    # The entropy of these very images, not of all.
    z = np.asarray(batch.z, np.float64)
    residual = z - CORRELATION * np.concatenate([0 * z[:, :1], z[:, :-1]], axis=1)
    entropy += 0.5 * np.log2(np.e) * (np.mean((residual / DEVIATION) ** 2) - 1)
    assert values["bits_per_dimension"].mean() == pytest.approx(entropy, abs=0.01 * abs(np.log2(255 / 2) + density))
    if path == "ddpm":  # the excess of steps with the posterior's variance: r - 1 - log r for each ratio r of two SNRs
        alpha_bar = schedules.alphas_cumprod()
        snr = alpha_bar / (1 - alpha_bar)
        posterior = 1 / (DEVIATION**-2 + snr)
        excess = 0.5 * np.sum((snr[:-1] - snr[1:]) * posterior[1:] - np.log(posterior[1:] / posterior[:-1]))
        discrete = values["bits_per_dimension_discrete"].mean()
        assert discrete == pytest.approx(entropy + excess / np.log(2), rel=0.01)


def test_the_decoder_sums_to_one_and_equals_the_normal_distribution():
    levels = np.arange(256) / 127.5 - 1
    for mean in (-1.3, -1.0, 0.1234, 0.99):
        nats = np.asarray(teacher_forcing.decoder_nats(jnp.asarray(levels, jnp.float32), mean, 0.01, True))
        edges = np.concatenate([[-np.inf], (levels[:-1] + levels[1:]) / 2, [np.inf]])
        expected = np.diff(stats.norm.cdf(edges, mean, 0.01))
        np.testing.assert_allclose(np.exp(-nats), expected, atol=2e-4)
        assert np.isfinite(nats).all()
    assert np.exp(-nats).sum() == pytest.approx(1, abs=1e-3)


@pytest.fixture(scope="module")
def single(mesh):
    """A model of one block with random weights, and the same image many times, with other noise each time."""
    c = small_config(blocks=1, depth=1, diffusion_depth=1, unet_channels=(4,), unet_attention=(False,))
    model = madformer.build(c)
    forward = TeacherForcing(c, model, random_params(model), mesh)
    image = np.random.default_rng(0).integers(0, 256, forward.sizes.block_shape) / 127.5 - 1
    return forward, model, np.broadcast_to(image, (ROWS, *image.shape))


def test_the_estimate_equals_the_sum_over_all_steps(mesh, single):
    forward, _, z = single
    batches = [
        batch_of(z[:ROWS])._replace(numbers=(x := np.arange(ROWS) + i), device_numbers=jnp.asarray(x))
        for i in (0, ROWS, 2 * ROWS)
    ]
    steps = np.arange(1000.0).reshape(-1, ROWS, 1)

    def errors(draw):
        levels = [Levels(t, *forward.schedule.alpha_sigma(t.astype(int))) for t in steps]
        return [forward.errors(batches[0], draw * len(steps) + i, x, clean_blocks=True) for i, x in enumerate(levels)]

    with partitioning.scope(mesh):
        draws = [errors(draw) for draw in range(3)]
        values = bits_per_dimension.measure(forward, lambda n: batches[:1] if n else batches)
        first = Levels(*(np.full((ROWS, 1), x) for x in bits_per_dimension.path_ends(forward.schedule)[0]))
        decoder = forward.errors(batches[0], 99, first, clean_blocks=True).decoder.mean()
    squared = np.array([np.concatenate([x.squared[:, 0] for x in draw])[1:] for draw in draws])
    alpha_bar = schedules.alphas_cumprod()
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    # KL of two Gaussians with the variance of the posterior, whose means differ by the clean estimate.
    variance = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * betas
    terms = alpha_bar[:-1] * betas**2 / (1 - alpha_bar[1:]) ** 2 / (2 * variance) * squared
    prior = 0.5 * np.sum(alpha_bar[-1] * (z[0] ** 2 - 1) - np.log(1 - alpha_bar[-1]))
    sums = (terms.sum(axis=1) + prior + decoder) / (z[0].size * np.log(2))  # each with noise of its own
    estimate = values["bits_per_dimension_discrete"]
    error = np.hypot(estimate.std() / len(estimate) ** 0.5, sums.std() / len(sums) ** 0.5)
    assert abs(estimate.mean() - sums.mean()) < 2 * error
    assert error < 0.01 * sums.mean()
    uniform = np.std(999 * terms) / (z[0].size * np.log(2)) * bits_per_dimension.DRAWS**-0.5
    assert estimate.std() < 0.2 * uniform  # importance cuts the deviation


def test_weights_add_up_to_the_sum_and_the_integral():
    integrand = np.random.default_rng(0).random(bits_per_dimension.BINS)
    times = bits_per_dimension.ImportanceTimes(schedules.DEFAULT, integrand)
    u = (np.arange(1_000_000) + 0.5) / 1e6
    alpha_bar = schedules.alphas_cumprod()
    snr = alpha_bar / (1 - alpha_bar)
    levels, weights = times.of_sum(u)
    expected = np.sum(0.5 * (snr[:-1] - snr[1:]) / (1 + snr[1:]))
    assert np.mean(weights * levels.sigma**2) == pytest.approx(expected, rel=1e-3)
    levels, weights = times.of_integral(u[::10])
    expected = 0.5 * np.log((1 + snr[0]) / (1 + snr[-1]))  # of d SNR / (1 + SNR)
    assert np.mean(weights * levels.sigma**2) == pytest.approx(expected, rel=1e-3)


def test_one_block_has_the_plain_bound(mesh, single):
    """For L = 1 the bound is that of a diffusion model, with the noise and timesteps of the estimate."""
    forward, model, z = single
    batch = batch_of(z[:8])
    times = bits_per_dimension.ImportanceTimes(forward.schedule, np.ones(bits_per_dimension.BINS))
    with partitioning.scope(mesh):
        values = bits_per_dimension.measure_batch(forward, batch, times)
    alpha_bar, x, nats = schedules.alphas_cumprod(), z[:8], 0.0
    params = random_params(model)
    apply = jax.jit(lambda z, x, t: model.apply({"params": params}, z, x, t, clean_t=0 * t, terms=("image",)).image)
    log_snr = np.log(alpha_bar / (1 - alpha_bar))

    def clean(t, level, draw):
        alpha, sigma = (np.sqrt(special.expit(s * level))[:, None, None, None] for s in (1, -1))
        noisy = alpha * x + sigma * np.asarray(block_noise(batch.device_numbers, draw, forward.sizes))
        given = jnp.asarray(noisy, jnp.float32), jnp.asarray(t, jnp.float32)[:, None]
        output = np.asarray(apply(0 * given[0], *given))
        return (noisy - sigma * output) / alpha

    for k in range(4):
        u = held_out_losses.low_discrepancy(4 * batch.numbers + k, 1, 300)[:, 0]
        level = log_snr[0] + (log_snr[-1] - log_snr[0]) * u
        t = np.interp(-level, -log_snr, np.arange(1000))
        squared = np.sum((x - clean(t, level, 300 + k)) ** 2, axis=(1, 2, 3))
        nats = nats + 0.25 * 0.5 * np.exp(level) * squared * (log_snr[0] - log_snr[-1])
    estimate = clean(np.zeros(8), np.full(8, log_snr[0]), 100)
    deviation = np.exp(-log_snr[0] / 2)
    edges = [np.where(abs(x + side) < 1e-6, side * -np.inf, x - side / 255) for side in (1, -1)]  # lower, upper
    normal = stats.norm(estimate, deviation)
    below, above = (  # of the bin's two ends, whichever tail has digits
        normal.logcdf(edges[1]) + np.log1p(-np.exp(normal.logcdf(edges[0]) - normal.logcdf(edges[1]))),
        normal.logsf(edges[0]) + np.log1p(-np.exp(normal.logsf(edges[1]) - normal.logsf(edges[0]))),
    )
    logs = np.where(x > estimate, above, below)
    prior = 0.5 * (alpha_bar[-1] * (x**2 - 1) - np.log(1 - alpha_bar[-1]))
    nats = nats + np.sum(prior - logs, axis=(1, 2, 3))
    np.testing.assert_allclose(values["bits_per_dimension"], nats / (x[0].size * np.log(2)), rtol=2e-3)


@pytest.mark.parametrize("path", ["flow", "cosine"])
def test_continuous_paths_begin_at_the_same_ratio(path):
    first, last = bits_per_dimension.path_ends(schedules.make(path))
    assert first.alpha / first.sigma == pytest.approx(bits_per_dimension.MAX_RATIO)
    assert 0 < first.t < 50 and last.t == 999
    assert schema.base().diffusion.path == "ddpm"
    assert bits_per_dimension.path_ends(schedules.DEFAULT)[0].t == 0
