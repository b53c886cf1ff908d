"""Block-autoregressive sampling with the KV cache (MADFormer, section 4).

For block i: the AR layers once, then the diffusion layers at every solver step, then the clean tower once on the finished
block (`Parts`). In `sample` all blocks run in one loop of one program.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from madformer_jax.diffusion import solvers
from madformer_jax.models.cache import ModelCache, write_finished_block
from madformer_jax.models.madformer import MADFormer


class BlockSteps(NamedTuple):
    """What a block goes through, each a pure function. `guided` runs every one twice: with the text, and behind it with "none"."""

    model: MADFormer
    params: Any
    guided: bool
    clip: float  # bound of the clean estimate; 0: none
    clean_t: int  # the timestep that finished blocks are given

    def begin(self, noise: Array, tokens: Array | None, lengths: Array | None) -> tuple[ModelCache, Array]:
        """An empty cache with the text in it, and what the first block is predicted from."""
        rows = (1 + self.guided) * len(noise)
        cache = self._call("empty_cache", rows)
        if tokens is not None:
            none = [jnp.full_like(tokens, self.model.none)] if self.guided else []
            if lengths is not None:  # "none" is one token
                lengths = jnp.concatenate([lengths, jnp.ones_like(lengths)] if self.guided else [lengths])
            cache = self._call("read_text", cache, jnp.concatenate([tokens, *none]), lengths)
        if self.model.neighbours:
            cache = cache._replace(finished=jnp.zeros_like(noise))
        return cache, self._call("begin", rows)

    def condition(self, cache: ModelCache, pred: Array, block: int | Array) -> tuple[Array, ModelCache]:
        """The AR layers: c of the block."""
        return self._call("condition", cache, pred, block)

    def step(
        self,
        cache: ModelCache,
        condition: Array,
        state: solvers.SolverState,
        row: solvers.Coefficients,
        w: Any,
        block: int | Array,
    ) -> tuple[solvers.SolverState, Any]:
        """One solver step, and the noisy block's own keys and values where there is no clean stream."""
        output, own = self._call("denoise", cache, condition, state.x, row.t, block)
        if self.guided:
            with_tokens, without = jnp.split(output, 2)
            output = without + w * (with_tokens - without)
        moved = solvers.step(state, output, row, self.clip, self.model.predicts)
        return moved, None if self.model.clean_stream else own

    def extend(self, cache: ModelCache, z: Array, own: Any, block: int | Array) -> tuple[ModelCache, Array]:
        """The cache with the finished block in it, and what the next one is predicted from."""
        c = self._call("embed_clean", cache, z, self.clean_t, block)
        if self.model.neighbours:
            cache = write_finished_block(cache, z, block)
        c = jnp.concatenate([c] * (1 + self.guided))
        if not self.model.clean_stream:
            return self._call("remember", cache, own, block), c
        return self._call("extend", cache, c, block), c

    def _call(self, method: str, *args: Any) -> Any:
        return self.model.apply({"params": self.params}, *args, method=method)


def clean_timestep(model: MADFormer, coefficients: solvers.Coefficients) -> int:
    """The timestep that finished blocks are given: 0, or that of the last solver step."""
    return int(coefficients.t[-1]) if model.clean_timestep == "noisy" else 0


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
        or one for each step (steps,), see `guidance.guidance_scales`. The number 1 runs no second branch; an array, whose values the
        program does not know, always does.
      clip: bound of the predicted clean latent; 0 for none.
      unroll: one copy of the program for each block instead of a loop (for counting its cost).

    Returns:
      Latent blocks (B, L, positions, C).
    """
    coefficients = solvers.coefficients(solver, spacing, steps)
    blocks = noise.shape[1]
    guided = tokens is not None and (isinstance(guidance, Array) or guidance != 1.0)
    parts = BlockSteps(model, params, guided, clip, clean_timestep(model, coefficients))

    def one_block(carry: tuple[ModelCache, Array], block: int | Array) -> tuple[tuple[ModelCache, Array], Array]:
        cache, pred = carry
        condition, cache = parts.condition(cache, pred, block)

        def solver_step(
            state: solvers.SolverState, at: tuple[solvers.Coefficients, Array]
        ) -> tuple[solvers.SolverState, None]:
            row, w = at
            return parts.step(cache, condition, state, row, w, block)[0], None

        scales = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), (steps,))
        rows = (jax.tree.map(jnp.asarray, coefficients), scales)
        state = solvers.initial_state(jax.lax.dynamic_slice_in_dim(noise, block, 1, axis=1))
        # The last step stands alone: its keys and values go to the cache when there is no clean stream.
        state, _ = jax.lax.scan(solver_step, state, jax.tree.map(lambda r: r[:-1], rows), unroll=steps if unroll else 1)
        last, w = jax.tree.map(lambda r: r[-1], rows)
        state, own = parts.step(cache, condition, state, last, w, block)
        z = state.x

        def extend(cache: ModelCache, pred: Array) -> tuple[ModelCache, Array]:
            return parts.extend(cache, z, own, block)

        if isinstance(block, int):
            return (extend(cache, pred) if block + 1 < blocks else carry), z
        return jax.lax.cond(block + 1 < blocks, extend, lambda *same: same, cache, pred), z

    carry = parts.begin(noise, tokens, lengths)
    if blocks == 1 or unroll:
        drawn = []
        for block in range(blocks):
            carry, z = one_block(carry, block)
            drawn.append(z)
        return jnp.concatenate(drawn, axis=1)
    _, z = jax.lax.scan(one_block, carry, jnp.arange(blocks))
    return jnp.swapaxes(z[:, :, 0], 0, 1)
