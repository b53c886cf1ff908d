"""Block-autoregressive sampling with a key-value cache (MADFormer, section 4).

For each block the AR layers run once, the diffusion layers run at every solver step, and the clean
tower runs once on the finished block, except after the last one. `sample` runs all blocks in one
loop of one program for `sampling.generation`. `sampling.trained_model` calls the steps of
`BlockSteps` one by one, to show an image while it forms. Shapes use the letters of the legend in
`models.madformer`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from madformer_jax.diffusion import solvers
from madformer_jax.diffusion.autoguidance import GuidedPair
from madformer_jax.models.cache import ModelCache, write_finished_block
from madformer_jax.models.madformer import MADFormer


class BlockSteps(NamedTuple):
    """The steps of sampling one block, each a pure function.

    If `guided`, the rows of a prediction are followed by guiding rows: those of the null token, in one
    batch with the conditional rows, or those of the guide of a `GuidedPair`.
    """

    model: MADFormer | GuidedPair
    params: Any
    guided: bool
    clip_x0: float  # bound of the clean estimate; 0 for none
    clean_timestep: int  # timestep of finished blocks, see the function `clean_timestep`

    def begin(self, noise: Array, tokens: Array | None, lengths: Array | None) -> tuple[ModelCache, Array]:
        """Returns a cache with the text only, and the first block's prediction stream."""
        rows = (1 + self._null_rows) * len(noise)
        cache = self._call("empty_cache", rows)
        if tokens is not None:
            null_tokens = [jnp.full_like(tokens, self.model.null_token)] if self._null_rows else []
            if lengths is not None:  # the null text is one token long
                lengths = jnp.concatenate([lengths, jnp.ones_like(lengths)] if self._null_rows else [lengths])
            cache = self._call("cache_text", cache, jnp.concatenate([tokens, *null_tokens]), lengths)
        if self.model.unet_context:
            cache = cache._replace(finished_blocks=jnp.zeros_like(noise))
        return cache, self._call("begin", rows)

    def condition(self, cache: ModelCache, pred: Array, block: int | Array) -> tuple[Array, ModelCache]:
        """Runs the AR layers; returns the block's condition and the cache."""
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
        """Runs one solver step.

        Args:
          cache: The cache with all earlier blocks.
          condition: The block's condition.
          state: The solver's state, of B blocks.
          row: Coefficients of the step.
          w: Guidance scale of the step.
          block: Index of the block.

        Returns:
          The new state. In a model without the clean stream also the noisy block's keys and values,
          for `cache_clean`, otherwise None.
        """
        output, kv = self._call("denoise", cache, condition, state.x, row.t, block)
        if self.guided:
            conditional, unconditional = jnp.split(output, 2)
            output = unconditional + w * (conditional - unconditional)
        state = solvers.step(state, output, row, self.clip_x0, self.model.prediction_type)
        return state, None if self.model.clean_stream else kv

    def cache_clean(self, cache: ModelCache, z: Array, kv: Any, block: int | Array) -> tuple[ModelCache, Array]:
        """Adds a finished block to the cache.

        Args:
          cache: The cache with all earlier blocks.
          z: The finished latent block `(B, 1, positions, C)`.
          kv: Keys and values of its last solver step, see `step`.
          block: Index of the block.

        Returns:
          The cache, and the next block's prediction stream.
        """
        c = self._call("embed_clean", cache, z, self.clean_timestep, block)
        if self.model.unet_context:
            cache = write_finished_block(cache, z, block)
        if self._null_rows:
            c = jnp.concatenate([c, c])
        if not self.model.clean_stream:
            return self._call("cache_noisy", cache, kv, block), c
        return self._call("cache_clean", cache, c, block), c

    @property
    def _null_rows(self) -> bool:
        """Whether the guiding rows are those of the null token."""
        return self.guided and not isinstance(self.model, GuidedPair)

    def _call(self, method: str, *args: Any) -> Any:
        return self.model.apply({"params": self.params}, *args, method=method)


def clean_timestep(model: MADFormer | GuidedPair, coefficients: solvers.Coefficients) -> int:
    """Returns the timestep with which finished blocks are embedded.

    It is that of the last solver step if `model.clean_timestep` is "noisy", and otherwise 0.
    """
    return int(coefficients.t[-1]) if model.clean_timestep == "noisy" else 0


def sample(
    model: MADFormer | GuidedPair,
    params: Any,
    noise: Array,
    tokens: Array | None = None,
    lengths: Array | None = None,
    *,
    solver: str,
    spacing: str,
    steps: int,
    guidance: float | Array = 1.0,
    clip_x0: float = 0.0,
    unroll: bool = False,
) -> Array:
    """Generates latent blocks from noise, one block after the other.

    The function is pure. Keyword arguments other than `guidance` are static under jit.

    Args:
      model: The model, or a model with its guide. The guide then takes the place of the null token.
      params: Its parameters, see `models.inference_params`.
      noise: Standard normal noise `(B, L, positions, C)`.
      tokens: Text tokens `(B, T)` of a conditional model. `model.null_token` stands for no text.
      lengths: Number of tokens of each text, `(B,)`; the rest is padding. By default all T tokens
        are text.
      solver: See `solvers.coefficients`.
      spacing: See `solvers.coefficients`.
      steps: Number of solver steps of each block.
      guidance: Scale w of classifier-free guidance, or one scale per step `(steps,)`, see
        `guidance.guidance_scales`. The output is unconditional + w (conditional - unconditional),
        for eps, v and x0 alike. The Python number 1 skips the unconditional rows. An array never
        skips them, because the program does not know its values.
      clip_x0: Bound of the predicted clean latent; 0 for none.
      unroll: Compiles one copy of the program per block and solver step in place of loops, to count
        its cost.

    Returns:
      Latent blocks `(B, L, positions, C)`.
    """
    coefficients = solvers.coefficients(solver, spacing, steps)
    blocks = noise.shape[1]
    has_guide = tokens is not None or isinstance(model, GuidedPair)
    guided = has_guide and (isinstance(guidance, Array) or guidance != 1.0)
    block_steps = BlockSteps(model, params, guided, clip_x0, clean_timestep(model, coefficients))

    def sample_block(carry: tuple[ModelCache, Array], block: int | Array) -> tuple[tuple[ModelCache, Array], Array]:
        cache, pred = carry
        condition, cache = block_steps.condition(cache, pred, block)

        def solver_step(
            state: solvers.SolverState, row_and_scale: tuple[solvers.Coefficients, Array]
        ) -> tuple[solvers.SolverState, None]:
            row, w = row_and_scale
            return block_steps.step(cache, condition, state, row, w, block)[0], None

        scales = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), (steps,))
        rows = (jax.tree.map(jnp.asarray, coefficients), scales)
        state = solvers.initial_state(jax.lax.dynamic_slice_in_dim(noise, block, 1, axis=1))
        # The last step is outside the scan because `cache_clean` may need its keys and values.
        state, _ = jax.lax.scan(solver_step, state, jax.tree.map(lambda r: r[:-1], rows), unroll=steps if unroll else 1)
        last_row, w = jax.tree.map(lambda r: r[-1], rows)
        state, kv = block_steps.step(cache, condition, state, last_row, w, block)
        z = state.x

        def cache_clean(cache: ModelCache, pred: Array) -> tuple[ModelCache, Array]:
            return block_steps.cache_clean(cache, z, kv, block)

        if isinstance(block, int):
            return (cache_clean(cache, pred) if block + 1 < blocks else carry), z
        return jax.lax.cond(block + 1 < blocks, cache_clean, lambda *same: same, cache, pred), z

    carry = block_steps.begin(noise, tokens, lengths)
    if blocks == 1 or unroll:
        finished = []
        for block in range(blocks):
            carry, z = sample_block(carry, block)
            finished.append(z)
        return jnp.concatenate(finished, axis=1)
    _, z = jax.lax.scan(sample_block, carry, jnp.arange(blocks))
    return jnp.swapaxes(z[:, :, 0], 0, 1)
