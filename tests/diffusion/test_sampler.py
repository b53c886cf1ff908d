import collections
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from madformer_jax.diffusion import sampler, solvers
from madformer_jax.models import madformer
from madformer_jax.weights import release
from madformer_jax.weights.release_config import preset
from tests.small import small

SOLVERS = {"ddim8": ("ddim", "leading"), "dpm8": ("dpmpp_2m", "linspace")}  # of the reference


@pytest.mark.parametrize("variant", ["baseline", "clear_cond", "clear_clean", "denoising_mlp"])
def test_release_samples(reference, variant):
    file = reference(f"madformer_{variant}.npz")
    c = preset(json.loads(str(file["meta"])))
    params = release.from_release({n.removeprefix("param/"): file[n] for n in file.files if n.startswith("param/")}, c)
    model = madformer.build(c)
    for name, (solver, spacing) in SOLVERS.items():
        np.testing.assert_array_equal(solvers.coefficients(solver, spacing, 8).t, file[f"sample/{name}_timesteps"])
        draw = jax.jit(functools.partial(sampler.sample, model, solver=solver, spacing=spacing, steps=8))
        found, expected = draw(params, file["sample/init_noise"]), file[f"sample/{name}"]
        assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected), name


def without_cache(model, params, noise, tokens, solver, spacing, steps, guidance):
    """Block-autoregressive sampling in which every step recomputes everything, with the forward pass of training."""
    table = solvers.coefficients(solver, spacing, steps)
    clean_t = int(table.t[-1]) if model.clean_timestep == "noisy" else 0
    batch, blocks = noise.shape[:2]
    t_of = functools.partial(jnp.full, (batch, blocks))

    @jax.jit
    def eps_of(z, noisy, t, tokens):
        forward = functools.partial(
            model.apply, {"params": params}, z, noisy, t, clean_t=t_of(clean_t), terms=("image",)
        )
        return forward(tokens).eps

    z, last_seen = jnp.zeros_like(noise), jnp.zeros_like(noise)
    for i in range(blocks):
        state = solvers.start(noise[:, i])
        for k in range(steps):
            row = jax.tree.map(lambda r, k=k: r[k], table)
            # without the clean stream, blocks before are those of their last solver step
            noisy = last_seen.at[:, i].set(state.x)
            t = t_of(int(table.t[-1])).at[:, i].set(int(row.t))
            eps = eps_of(z, noisy, t, tokens)[:, i]
            if tokens is not None and guidance != 1.0:
                none = eps_of(z, noisy, t, jnp.full_like(tokens, model.classes))[:, i]
                eps = none + guidance * (eps - none)
            if k == steps - 1:
                last_seen = last_seen.at[:, i].set(state.x)
            state = solvers.step(state, eps, row)
        z = z.at[:, i].set(state.x)
    return z


SWITCHES = {  # the four variants of the release, each alone, are in test_release_samples
    "all streams": {},
    "release options, shared": {
        "rope": "release", "time_embedding": "raw", "clean_timestep": "noisy", "param_sets": "shared",
    },
    "no clean stream": {"classes": 3, "clean_stream": False},
    "block only, no condition": {"classes": 3, "diffusion_attention": "block", "ar_condition": False},
    "no clean stream, no condition": {"clean_stream": False, "ar_condition": False},
    "D = N": {"diffusion_depth": 4},
    "D = 1": {"diffusion_depth": 1, "depth": 3},
    "one block": {"blocks": 1, "diffusion_depth": 4},
    "sixteen blocks": {"blocks": 16, "unet_stride": 1, "classes": 3, "depth": 2, "diffusion_depth": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", SWITCHES)
def test_cached_sampling_equals_full_recomputation(name):
    model, params = small(**SWITCHES[name])
    noise = jax.random.normal(jax.random.key(2), (2, model.blocks, model.block_side**2, model.channels))
    tokens = jnp.array([[2], [0]]) if model.classes else None
    settings = {"solver": "dpmpp_2m", "spacing": "trailing", "steps": 2, "guidance": 2.0 if model.classes else 1.0}
    cached = jax.jit(functools.partial(sampler.sample, model, **settings))(params, noise, tokens)
    expected = without_cache(model, params, noise, tokens, **settings)
    assert float(jnp.linalg.norm(expected)) > 1
    # block by block, against the block's own size: single values may be near zero where others are near 300
    error, size = (jnp.linalg.norm(x, axis=(2, 3)) for x in (cached - expected, expected))
    assert (error < 2e-5 * size).all()


def test_one_program_for_each_block_draws_the_same():
    model, params = small(classes=3)
    noise = jax.random.normal(jax.random.key(2), (2, 4, 16, 3))
    settings = {"solver": "ddim", "spacing": "trailing", "steps": 2, "guidance": 1.5}
    loop, unrolled = (
        jax.jit(functools.partial(sampler.sample, model, unroll=unroll, **settings))(
            params, noise, jnp.array([[1], [2]])
        )
        for unroll in (False, True)
    )
    np.testing.assert_allclose(loop, unrolled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clean_stream", [True, False])
def test_layers_run_as_often_as_the_paper_counts(clean_stream):
    """AR layers L times, diffusion layers L * steps times, the clean tower once for each block but the last."""
    model, params = small(clean_stream=clean_stream)
    noise, steps, calls = jnp.ones((2, model.blocks, 16, 3)), 3, collections.Counter()

    def count(run, args, kwargs, context):
        if isinstance(context.module, madformer.MADFormer):
            jax.debug.callback(functools.partial(calls.update, [context.method_name]))
        return run(*args, **kwargs)

    with nn.intercept_methods(count):
        draw = functools.partial(sampler.sample, model, solver="dpmpp_2m", spacing="trailing", steps=steps)
        jax.block_until_ready(jax.jit(draw)(params, noise))
    jax.effects_barrier()
    blocks = model.blocks
    assert calls["condition"] == blocks
    assert calls["denoise"] == blocks * steps
    assert calls["extend" if clean_stream else "remember"] == blocks - 1
    assert calls["__call__"] == 0


def test_guidance_of_one_runs_no_second_branch():
    model, params = small(classes=3)
    noise, tokens = jnp.ones((2, 4, 16, 3)), jnp.array([[1], [2]])

    def flops(guidance):
        draw = functools.partial(
            sampler.sample, model, solver="ddim", spacing="trailing", steps=1, guidance=guidance, unroll=True
        )
        return jax.jit(draw).lower(params, noise, tokens).cost_analysis()["flops"]

    assert flops(2.0) > 1.5 * flops(1.0)
