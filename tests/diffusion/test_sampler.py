import collections
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from madformer_jax.cost import flops
from madformer_jax.diffusion import guidance, parameterization, sampler, schedule, solvers
from madformer_jax.models import madformer
from madformer_jax.models.transformer import DecoderLayer
from madformer_jax.weights import release
from madformer_jax.weights.release_config import preset
from tests.small import small, small_config

# Reference samples of each variant. tests/modes/test_convert.py has denoising_mlp's DDIM samples.
RELEASE = {
    "baseline": ("ddim8", "ddim", "leading"),
    "clear_cond": ("dpm8", "dpmpp_2m", "linspace"),
    "clear_clean": ("ddim8", "ddim", "leading"),
    "denoising_mlp": ("dpm8", "dpmpp_2m", "linspace"),
}


@pytest.mark.parametrize("variant", RELEASE)
def test_release_samples(reference, variant):
    file = reference(f"madformer_{variant}.npz")
    c = preset(json.loads(str(file["meta"])))
    params = release.from_release({n.removeprefix("param/"): file[n] for n in file.files if n.startswith("param/")}, c)
    name, solver, spacing = RELEASE[variant]
    coefficients = solvers.make(solver).coefficients(schedule.DEFAULT, spacing, 8)
    np.testing.assert_array_equal(coefficients.level.t, file[f"sample/{name}_timesteps"])
    draw = jax.jit(functools.partial(sampler.sample, madformer.build(c), solver=solver, spacing=spacing, steps=8))
    samples, expected = draw(params, file["sample/init_noise"]), file[f"sample/{name}"]
    assert np.linalg.norm(samples - expected) < 1e-3 * np.linalg.norm(expected)


def without_cache(
    model, params, noise, tokens, lengths, keys, solver, spacing, steps, path, guidance=1.0, context_noise=0
):
    """Samples block by block, with a full training forward at every evaluation in place of the cache.

    An evaluation with guidance scale 1 computes the conditional prediction only. `steps` is one number, or one
    for each block; `guidance` then has a row for each block.
    """
    solver = solvers.make(solver)
    batch, blocks = noise.shape[:2]
    by_block = isinstance(steps, tuple)
    tables = [
        solvers.evaluation_rows(solver.coefficients(path, spacing, n))
        for n in (steps if by_block else [steps] * blocks)
    ]
    last_t = np.array([rows[-1].level.t for rows in tables])
    clean_t = last_t if model.config.clean_timestep == "noisy" else context_noise
    fold = jax.random.fold_in

    @jax.jit
    def output_of(z, noisy, t, tokens, lengths):
        clean = jnp.broadcast_to(jnp.asarray(clean_t, path.dtype), (batch, blocks))
        return model.apply({"params": params}, z, noisy, t, tokens, lengths, clean_t=clean, terms=("image",)).image

    z, context, last_inputs = np.zeros_like(noise), np.zeros_like(noise), np.zeros_like(noise)
    for i in range(blocks):
        state = solver.init(jnp.asarray(noise[:, i]))
        rows = tables[i]
        scales = np.broadcast_to(guidance, (blocks, max(map(len, tables))) if by_block else len(rows))
        for row, scale in zip(rows, scales[i] if by_block else scales):

            def denoise(x, level, scale=scale, i=i):
                # Without the clean stream, later blocks attend to a block's last noisy input.
                noisy, t = last_inputs.copy(), np.tile(last_t, (batch, 1))
                noisy[:, i], t[:, i] = x, level.t
                out = np.asarray(output_of(context, noisy, t, tokens, lengths))[:, i]
                if tokens is not None and scale != 1.0:
                    null_lengths = None if lengths is None else np.ones_like(lengths)
                    null_tokens = np.full_like(tokens, model.config.null_token)
                    unconditional = np.asarray(output_of(context, noisy, t, null_tokens, null_lengths))[:, i]
                    out = unconditional + scale * (out - unconditional)
                return parameterization.clean_estimate(model.config.prediction_type, out, np.asarray(x), level), None

            def normal(row=row, i=i):
                return np.stack(
                    [jax.random.normal(fold(fold(key, i), row.index), noise[0, i][None].shape)[0] for key in keys]
                )

            last = state.x
            state, _ = solver.step(denoise, state, row, normal)
        last_inputs[:, i], z[:, i], context[:, i] = last, state.x, state.x
        if context_noise:
            level = path.level(np.array([context_noise]))
            drawn = [jax.random.normal(fold(fold(key, i), 2**31 - 1), noise[0, i].shape) for key in keys]
            context[:, i] = level.alpha * z[:, i] + level.sigma * np.stack(drawn)
    return z


ONE_STAGE = {"unet_channels": (4,), "unet_attention": (False,)}
SWITCHES = {  # test_release_samples has the four variants of the release
    "all streams": {},
    "release options, shared": {
        "rope": "release", "time_embedding": "raw", "clean_timestep": "noisy", "param_sets": "shared",
        "depth": 3, **ONE_STAGE,
    },
    "no clean stream": {"classes": 3, "clean_stream": False, **ONE_STAGE},
    "block only, no condition": {"classes": 3, "diffusion_attention": "block", "ar_condition": False, **ONE_STAGE},
    "no clean stream, no condition": {
        "clean_stream": False, "ar_condition": False, "depth": 2, "diffusion_depth": 1, **ONE_STAGE,
    },
    "D = N, v": {"prediction_type": "v", "depth": 3, "diffusion_depth": 3, **ONE_STAGE},
    "one block, x0": {"prediction_type": "x0", "blocks": 1, "depth": 2, "diffusion_depth": 2, **ONE_STAGE},
    "eight blocks, twice as high as wide, D = 1, x0": {
        "blocks": 8, "unet_stride": 1, "classes": 3, "depth": 3, "diffusion_depth": 1, "prediction_type": "x0", "unet_context": True,
    },
    "captions with padding": {"classes": 6, "text_length": 4, "depth": 2, "diffusion_depth": 1, **ONE_STAGE},
    "a TPU's kernels": {
        "classes": 3, "attention": "pallas", "blocks": 2, "depth": 3, "diffusion_depth": 2, **ONE_STAGE,
    },
    "block only": {"diffusion_attention": "block", **ONE_STAGE},
    "one program for each block": {"blocks": 2, "classes": 3, "depth": 2, "diffusion_depth": 1, **ONE_STAGE},
}  # fmt: skip
DDPM, FLOW, COSINE = (schedule.make(path) for path in ("ddpm", "flow", "cosine"))
T = DDPM.solver_timesteps("trailing", 3)[:-1]  # 999, 666, 332
GUIDED = {  # the others with classes have a constant scale
    "no clean stream": guidance.guidance_scales(2.0, "linear", (0, 999), T.repeat(2)[1:]),  # of Heun
    "eight blocks, twice as high as wide, D = 1, x0": guidance.guidance_scales(3.0, "constant", (400, 700), T),
}
SOLVED = {  # the others are solved with dpmpp_2m on the DDPM path
    "release options, shared": ("heun", FLOW),
    "no clean stream": ("heun", DDPM),
    "no clean stream, no condition": ("ancestral", FLOW),
    "D = N, v": ("euler", FLOW),
    "one block, x0": ("ancestral", DDPM),
    "captions with padding": ("dpmpp_2m", COSINE),
    "one program for each block": ("heun", COSINE),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_cached_sampling_equals_full_recomputation(name):
    """Checks samples and the number of layer calls.

    AR layers run L times, diffusion layers L times at every evaluation, and the clean tower once for
    each block but the last, as in the paper. `flops.model_passes` must count all of them.
    """
    model, params = small(**SWITCHES[name])
    config, steps, calls, layers = model.config, 3, collections.Counter(), collections.Counter()
    blocks = config.sizes.blocks
    noise = np.random.default_rng(2).standard_normal((2, *config.sizes.block_shape), np.float32)
    tokens = np.array([[2, 4, 1, 0], [0, 3, 5, 2]])[:, : config.text_length] if config.vocabulary else None
    solver, path = SOLVED.get(name, ("dpmpp_2m", DDPM))
    settings = {"solver": solver, "spacing": "trailing", "steps": steps}
    keys = jax.random.split(jax.random.key(7), 2)
    lengths = np.array([3, 2]) if config.text_length > 1 else None
    scale = {"guidance": GUIDED.get(name, 2.0)} if tokens is not None else {}
    unroll = name == "one program for each block"
    draw = functools.partial(sampler.sample, model, unroll=unroll, schedule=path, **settings)

    def count(run, args, kwargs, context):
        if isinstance(context.module, madformer.MADFormer):
            jax.debug.callback(functools.partial(calls.update, [context.method_name]))
        if isinstance(context.module, DecoderLayer) and context.method_name == "step":
            rows = {stream: len(x) for stream, x in args[0].as_dict.items()}
            jax.debug.callback(functools.partial(layers.update, rows))
        return run(*args, **kwargs)

    with nn.intercept_methods(count):
        cached = np.asarray(jax.jit(draw)(params, noise, tokens, lengths, keys, **scale))
    jax.effects_barrier()
    expected = without_cache(model, params, noise, tokens, lengths, keys, path=path, **settings, **scale)
    assert np.linalg.norm(expected) > 1
    # Errors are relative to the norm of each block, because single values range from 0 to 300.
    error, size = (np.linalg.norm(x, axis=(2, 3)) for x in (cached - expected, expected))
    assert (error < 2e-5 * size).all()
    assert calls["condition"] == blocks
    assert calls["denoise"] == blocks * (2 * steps - 1 if solver == "heun" else steps)
    assert calls["cache_clean" if config.switches.clean_stream else "cache_noisy"] == blocks - 1
    assert calls["__call__"] == 0
    c = small_config(**SWITCHES[name])
    c.sample.solver, c.sample.steps, c.sample.guidance = solver, steps, 2.0 if scale else 1.0
    assert (layers["pred"] + layers["clean"]) / len(noise) == pytest.approx(
        flops.model_passes(c) * c.model.depth * blocks
    )


def test_clip_x0_bounds_the_clean_estimate():
    """The last evaluation of a solver ends at the clean estimate."""
    model, params = small(blocks=1, depth=1, diffusion_depth=1, **ONE_STAGE)
    draw = functools.partial(sampler.sample, model, params, solver="ddim", spacing="trailing", steps=1)
    noise = jnp.full((1, 1, 64, 3), 5.0)
    free, clipped = (np.asarray(jax.jit(functools.partial(draw, clip_x0=bound))(noise)) for bound in (0.0, 1.0))
    assert np.abs(free).max() > 1
    np.testing.assert_allclose(clipped, np.clip(free, -1, 1), rtol=1e-5)


def test_guidance_scale_1_skips_the_unconditional_rows_unless_it_is_in_an_array():
    model, params = small(classes=3, blocks=1, depth=2, diffusion_depth=2, **ONE_STAGE)
    noise, tokens = jnp.ones((2, 1, 64, 3)), jnp.array([[1], [2]])

    def cost(guidance):
        draw = functools.partial(
            sampler.sample, model, solver="ddim", spacing="trailing", steps=1, guidance=guidance, unroll=True
        )
        return jax.jit(draw).lower(params, noise, tokens).cost_analysis()["flops"]

    assert cost(np.ones(1, np.float32)) > 1.5 * cost(1.0)
