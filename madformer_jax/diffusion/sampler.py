"""Block-autoregressive sampling with the KV cache (MADFormer, section 4).

For block i: the AR layers once, then the diffusion layers at every solver step, then the clean tower once on the finished
block. All blocks run in one loop of one program.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from madformer_jax.diffusion import solvers
from madformer_jax.models.madformer import MADFormer, ModelCache


def sample(
    model: MADFormer,
    params: Any,
    noise: Array,
    tokens: Array | None = None,
    lengths: Array | None = None,
    *,
    solver: str,
    spacing: str,
    steps: int,
    guidance: float | Array = 1.0,
    clip: float = 0.0,
    unroll: bool = False,
) -> Array:
    """Latent blocks from noise, one block after the other. Pure; everything behind the star but the guidance is static under jit.

    Args:
      noise: (B, L, positions, C), standard normal.
      tokens: text tokens (B, T) of a conditional model; `model.none` means none.
      lengths: tokens of each text, (B,); what stands behind them is padding. By default all T are text.
      solver, spacing, steps: see `solvers.coefficients`.
      guidance: scale w of classifier-free guidance, out = out_none + w (out_tokens - out_none), the same in eps, v and x0;
        or one for each step (steps,), see `guidance.scales`. The number 1 runs no second branch; an array, whose values the
        program does not know, always does.
      clip: bound of the predicted clean latent; 0 for none.
      unroll: one copy of the program for each block instead of a loop (for counting its cost).

    Returns:
      Latent blocks (B, L, positions, C).
    """
    coefficients = solvers.coefficients(solver, spacing, steps)
    clean_t = int(coefficients.t[-1]) if model.clean_timestep == "noisy" else 0
    batch, blocks = noise.shape[:2]
    guided = tokens is not None and (isinstance(guidance, Array) or guidance != 1.0)
    branches = 2 if guided else 1

    def call(method: str, *args: Any) -> Any:
        return model.apply({"params": params}, *args, method=method)

    def repeat(x: Array) -> Array:
        return jnp.concatenate([x] * branches)

    def output_of(
        cache: ModelCache, condition: Array, x: Array, t: Any, w: Array, block: int | Array
    ) -> tuple[Array, Any]:
        output, own = call("denoise", cache, condition, x, t, block)
        if guided:
            with_tokens, without = jnp.split(output, 2)
            output = without + w * (with_tokens - without)
        return output, None if model.clean_stream else own

    def one_block(carry: tuple[ModelCache, Array], block: int | Array) -> tuple[tuple[ModelCache, Array], Array]:
        cache, pred = carry
        condition, cache = call("condition", cache, pred, block)
        x = jax.lax.dynamic_slice_in_dim(noise, block, 1, axis=1)

        def solver_step(state: solvers.Iterate, at: tuple[solvers.Coefficients, Array]) -> tuple[solvers.Iterate, None]:
            row, w = at
            output, _ = output_of(cache, condition, state.x, row.t, w, block)
            return solvers.step(state, output, row, clip, model.predicts), None

        scales = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), (steps,))
        rows = (jax.tree.map(jnp.asarray, coefficients), scales)
        state = solvers.start(x)
        # The last step stands alone: its keys and values go to the cache when there is no clean stream.
        state, _ = jax.lax.scan(solver_step, state, jax.tree.map(lambda r: r[:-1], rows), unroll=steps if unroll else 1)
        last, w = jax.tree.map(lambda r: r[-1], rows)
        output, own = output_of(cache, condition, state.x, last.t, w, block)
        z = solvers.step(state, output, last, clip, model.predicts).x

        def extend(cache: ModelCache, pred: Array) -> tuple[ModelCache, Array]:
            c = repeat(call("embed_clean", z, clean_t))
            if not model.clean_stream:
                return call("remember", cache, own, block), c
            return call("extend", cache, c, block), c

        if isinstance(block, int):
            return (extend(cache, pred) if block + 1 < blocks else carry), z
        return jax.lax.cond(block + 1 < blocks, extend, lambda *same: same, cache, pred), z

    cache = call("empty_cache", branches * batch)
    if tokens is not None:
        none = [jnp.full_like(tokens, model.none)] if guided else []
        if lengths is not None:  # "none" is one token
            lengths = jnp.concatenate([lengths, jnp.ones_like(lengths)] if guided else [lengths])
        cache = call("read_text", cache, jnp.concatenate([tokens, *none]), lengths)
    carry = (cache, call("begin", branches * batch))
    if blocks == 1 or unroll:
        parts = []
        for block in range(blocks):
            carry, z = one_block(carry, block)
            parts.append(z)
        return jnp.concatenate(parts, axis=1)
    _, z = jax.lax.scan(one_block, carry, jnp.arange(blocks))
    return jnp.swapaxes(z[:, :, 0], 0, 1)
