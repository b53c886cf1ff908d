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
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from madformer_jax.diffusion import parameterization, solvers
from madformer_jax.diffusion import schedule as schedules
from madformer_jax.diffusion.autoguidance import GuidedPair, PairCache
from madformer_jax.diffusion.schedule import NoiseLevel, Schedule
from madformer_jax.diffusion.solvers import Solver
from madformer_jax.models.cache import ModelCache
from madformer_jax.models.madformer import MADFormer

Cache = ModelCache | PairCache
Tokens = Float[Array, "rows 1 s _"]
Stream = Tokens | tuple[Tokens, Tokens]  # of a model, or of a model and its guide


class BlockSteps(NamedTuple):
    """The steps of sampling one block, each a pure function.

    If `guided`, the rows of a prediction are followed by guiding rows: those of the null token, in one
    batch with the conditional rows, or those of the guide of a `GuidedPair`.
    """

    model: MADFormer | GuidedPair
    params: Any
    solver: Solver
    guided: bool
    clip_x0: float  # bound of the clean estimate; 0 for none
    clean_timestep: int | float | Array  # timestep of finished blocks, see the function `clean_timestep`

    def begin(
        self,
        noise: Float[Array, "B L positions C"],
        tokens: Int[Array, "B T"] | None,
        lengths: Int[Array, " B"] | None,
    ) -> tuple[Cache, Stream]:
        """Returns a cache with the text only, and the first block's prediction stream."""
        rows = (1 + self._null_rows) * len(noise)
        cache = self._call("empty_cache", rows)
        if tokens is not None:
            null_tokens = [jnp.full_like(tokens, self.model.config.null_token)] if self._null_rows else []
            if lengths is not None:  # the null text is one token long
                lengths = jnp.concatenate([lengths, jnp.ones_like(lengths)] if self._null_rows else [lengths])
            cache = self._call("cache_text", cache, jnp.concatenate([tokens, *null_tokens]), lengths)
        if self.model.config.unet_context:
            cache = cache._replace(finished_blocks=jnp.zeros_like(noise))
        return cache, self._call("begin", rows)

    def condition(self, cache: Cache, pred: Stream, block: int | Array) -> tuple[Stream, Cache]:
        """Runs the AR layers; returns the block's condition and the cache."""
        return self._call("condition", cache, pred, block)

    def step(
        self,
        cache: Cache,
        condition: Stream,
        state: solvers.SolverState,
        row: solvers.Coefficients,
        w: Any,
        block: int | Array,
        keys: Array | None = None,
    ) -> tuple[solvers.SolverState, Any]:
        """Runs one evaluation of the network and updates the sample.

        Args:
          cache: The cache with all earlier blocks.
          condition: The block's condition.
          state: The solver's state, of B blocks.
          row: Coefficients of the evaluation.
          w: Guidance scale of the evaluation.
          block: Index of the block.
          keys: Random key of each image, `(B,)`, for stochastic solvers.

        Returns:
          The new state. In a model without the clean stream also the noisy block's keys and values,
          for `cache_clean`, otherwise None.
        """
        config = self.model.config

        def denoise(x: Array, level: NoiseLevel) -> tuple[Array, Any]:
            output, kv = self._call("denoise", cache, condition, x, level.t, block)
            if self.guided:
                conditional, unconditional = jnp.split(output, 2)
                output = unconditional + w * (conditional - unconditional)
            x0: Any = parameterization.clean_estimate(config.prediction_type, output, x, level)
            x0 = jnp.clip(x0, -self.clip_x0, self.clip_x0) if self.clip_x0 else x0
            return x0, None if config.clean_stream else kv

        def normal() -> Array:
            return _step_noise(keys, block, row.index, state.x.shape[1:])

        return self.solver.step(denoise, state, row, normal)

    def cache_clean(self, cache: Cache, z: Array, kv: Any, block: int | Array) -> tuple[Cache, Stream]:
        """Adds a finished block to the cache.

        Args:
          cache: The cache with all earlier blocks.
          z: The finished latent block `(B, 1, positions, C)`.
          kv: Keys and values of its last evaluation, see `step`.
          block: Index of the block.

        Returns:
          The cache, and the next block's prediction stream.
        """
        c = self._call("embed_clean", cache, z, self.clean_timestep, block)
        if cache.finished_blocks is not None:
            finished = jax.lax.dynamic_update_slice_in_dim(cache.finished_blocks, z, block, axis=1)
            cache = cache._replace(finished_blocks=finished)
        if self._null_rows:
            c = jnp.concatenate([c, c])
        if not self.model.config.clean_stream:
            return self._call("cache_noisy", cache, kv, block), c
        return self._call("cache_clean", cache, c, block), c

    @property
    def _null_rows(self) -> bool:
        """Whether the guiding rows are those of the null token."""
        return self.guided and not isinstance(self.model, GuidedPair)

    def _call(self, method: str, *args: Any) -> Any:
        return self.model.apply({"params": self.params}, *args, method=method)


def clean_timestep(model: MADFormer | GuidedPair, coefficients: solvers.Coefficients) -> int | float | Array:
    """Returns the timestep with which finished blocks are embedded.

    It is that of the last evaluation if `model.config.clean_timestep` is "noisy", and otherwise 0.
    """
    if model.config.clean_timestep != "noisy":
        return 0
    timestep: Any = coefficients.level.t[-1]
    return timestep if isinstance(timestep, Array) else timestep.item()


def _step_noise(keys: Array | None, block: int | Array, index: Any, shape: tuple[int, ...]) -> Array:
    """Draws the noise of an evaluation for each image: a function of its key, the block and the index.

    Raises:
      ValueError: There are no keys.
    """
    if keys is None:
        raise ValueError("a stochastic solver needs the random keys of the images")

    def draw(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, block), index), shape, jnp.float32)

    return jax.vmap(draw)(keys)


def sample(
    model: MADFormer | GuidedPair,
    params: Any,
    noise: Float[Array, "B L positions C"],
    tokens: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    keys: Array | None = None,
    *,
    solver: str,
    spacing: str,
    steps: int,
    schedule: Schedule = schedules.DEFAULT,
    guidance: float | np.ndarray | Array = 1.0,
    clip_x0: float = 0.0,
    unroll: bool = False,
    padded: solvers.PaddedCoefficients | None = None,
) -> Float[Array, "B L positions C"]:
    """Generates latent blocks from noise, one block after the other.

    The function is pure. Keyword arguments other than `guidance` and `padded` are static under jit.

    Args:
      model: The model, or a model with its guide. The guide then takes the place of the null token.
      params: Its parameters, see `models.inference_params`.
      noise: Standard normal noise `(B, L, positions, C)`.
      tokens: Text tokens `(B, T)` of a conditional model. `model.config.null_token` stands for no text.
      lengths: Number of tokens of each text, `(B,)`; the rest is padding. By default all T tokens
        are text.
      keys: Random key of each image, `(B,)`. Stochastic solvers need them.
      solver: A name of `choices.SOLVERS`.
      spacing: See `Schedule.solver_timesteps`.
      steps: Number of solver steps of each block.
      schedule: The noise path.
      guidance: Scale w of classifier-free guidance, or one scale per evaluation `(evaluations,)`,
        see `guidance.guidance_scales`. The output is unconditional + w (conditional - unconditional),
        for eps, v and x0 alike. The Python number 1 skips the unconditional rows. An array never
        skips them, because the program does not know its values.
      clip_x0: Bound of the predicted clean latent; 0 for none.
      unroll: Compiles one copy of the program per block and solver step in place of loops, to count
        its cost.
      padded: Coefficients in place of those that `spacing`, `steps` and `schedule` give, for a program
        that serves many numbers of steps. An array `guidance` has their size.

    Returns:
      Latent blocks `(B, L, positions, C)`.
    """
    method = solvers.make(solver)
    coefficients = method.coefficients(schedule, spacing, steps) if padded is None else padded.rows
    evaluations = len(coefficients.index)
    blocks = noise.shape[1]
    has_guide = tokens is not None or isinstance(model, GuidedPair)
    guided = has_guide and (isinstance(guidance, Array) or guidance != 1.0)
    block_steps = BlockSteps(model, params, method, guided, clip_x0, clean_timestep(model, coefficients))

    def sample_block(carry: tuple[Cache, Stream], block: int | Array) -> tuple[tuple[Cache, Stream], Array]:
        cache, pred = carry
        condition, cache = block_steps.condition(cache, pred, block)

        def evaluate(
            state: solvers.SolverState, row_and_scale: tuple[solvers.Coefficients, Array]
        ) -> tuple[solvers.SolverState, None]:
            row, w = row_and_scale
            return block_steps.step(cache, condition, state, row, w, block, keys)[0], None

        scales = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), (evaluations,))
        rows = (jax.tree.map(jnp.asarray, coefficients), scales)
        state = method.init(jax.lax.dynamic_slice_in_dim(noise, block, 1, axis=1))
        # The last evaluation is outside the scan because `cache_clean` may need its keys and values.
        first_rows = jax.tree.map(lambda r: r[:-1], rows)
        if padded is None:
            state, _ = jax.lax.scan(evaluate, state, first_rows, unroll=evaluations if unroll else 1)
        else:
            state = jax.lax.fori_loop(
                0,
                padded.evaluations - 1,
                lambda k, state: evaluate(state, jax.tree.map(lambda r: r[k], first_rows))[0],
                state,
            )
        last_row, w = jax.tree.map(lambda r: r[-1], rows)
        state, kv = block_steps.step(cache, condition, state, last_row, w, block, keys)
        z = state.x

        def cache_clean(cache: Cache, pred: Stream) -> tuple[Cache, Stream]:
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
