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

from madformer_jax.diffusion import block_tables, parameterization, solvers
from madformer_jax.diffusion import schedule as schedules
from madformer_jax.diffusion.autoguidance import GuidedPair, PairCache
from madformer_jax.diffusion.guidance import guide
from madformer_jax.diffusion.schedule import NoiseLevel, Schedule
from madformer_jax.diffusion.solvers import Solver
from madformer_jax.models import block_order
from madformer_jax.models.block_order import Order
from madformer_jax.models.cache import ModelCache
from madformer_jax.models.madformer import MADFormer

Cache = ModelCache | PairCache
Tokens = Float[Array, "rows 1 s _"]
Stream = Tokens | tuple[Tokens, Tokens]  # of a model, or of a model and its guide


_CONTEXT_INDEX = 2**31 - 1  # in place of the number of an evaluation, for the key of noise on the context


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
    context_level: NoiseLevel | None = None  # noise on finished blocks that later blocks read; None for none

    def begin(
        self,
        noise: Float[Array, "B L positions C"],
        tokens: Int[Array, "B T"] | None,
        lengths: Int[Array, " B"] | None,
        order: Order | None = None,
    ) -> tuple[Cache, Stream]:
        """Returns a cache with the text only, and the first block's prediction stream.

        The arguments are those of `sample`. Of the noise only the shape is used.
        """
        rows = (1 + self._null_rows) * len(noise)
        cache = self._call("empty_cache", rows, order)
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
        returns_kv: bool = False,
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
          returns_kv: Whether a model with the clean stream returns keys and values too.

        Returns:
          The new state, and the noisy block's keys and values for `cache_noisy`, or None.
        """
        config = self.model.config

        def denoise(x: Array, level: NoiseLevel) -> tuple[Array, Any]:
            output, kv = self._call("denoise", cache, condition, x, level.t, block)
            output = guide(output, w) if self.guided else output
            x0: Any = parameterization.clean_estimate(config.prediction_type, output, x, level, self.clip_x0)
            return x0, kv

        def normal() -> Array:
            return _step_noise(keys, block, row.index, state.x.shape[1:])

        state, kv = self.solver.step(denoise, state, row, normal)
        return state, kv if returns_kv or not config.switches.clean_stream else None

    def cache_noisy(self, cache: Cache, kv: Any, block: int | Array) -> Cache:
        """Adds the keys and values of a noisy block to the cache."""
        return self._call("cache_noisy", cache, kv, block)

    def cache_clean(
        self, cache: Cache, z: Array, kv: Any, block: int | Array, keys: Array | None = None
    ) -> tuple[Cache, Stream]:
        """Adds a finished block to the cache.

        Args:
          cache: The cache with all earlier blocks.
          z: The finished latent block `(B, 1, positions, C)`.
          kv: Keys and values of its last evaluation, see `step`.
          block: Index of the block.
          keys: Random key of each image, `(B,)`, for noise on the context.

        Returns:
          The cache, and the next block's prediction stream.
        """
        if self.context_level is not None:
            noise = _step_noise(keys, block, _CONTEXT_INDEX, z.shape[1:])
            z = self.context_level.alpha * z + self.context_level.sigma * noise
        c = self._call("embed_clean", cache, z, self.clean_timestep, block)
        if cache.finished_blocks is not None:
            finished = jax.lax.dynamic_update_slice_in_dim(cache.finished_blocks, z, block, axis=1)
            cache = cache._replace(finished_blocks=finished)
        if self._null_rows:
            c = jnp.concatenate([c, c])
        if not self.model.config.switches.clean_stream:
            return self.cache_noisy(cache, kv, block), c
        return self._call("cache_clean", cache, c, block), c

    def cache_kept_blocks(
        self,
        cache: Cache,
        pred: Stream,
        kept_blocks: Float[Array, "B K positions C"],
        keys: Array | None = None,
        unroll: bool = False,
    ) -> tuple[Cache, Stream]:
        """Adds K clean blocks, the first of the order, to an empty cache.

        Args:
          cache: The cache of `begin`.
          pred: The prediction stream of `begin`.
          kept_blocks: The blocks, in the order of generation.
          keys: See `cache_clean`.
          unroll: See `sample`.

        Returns:
          The cache, and the prediction stream of block K.
        """

        def add(carry: tuple[Cache, Stream], block: int | Array) -> tuple[tuple[Cache, Stream], None]:
            z = jax.lax.dynamic_slice_in_dim(kept_blocks, block, 1, axis=1)
            return self.cache_clean(carry[0], z, None, block, keys), None

        carry, count = (cache, pred), kept_blocks.shape[1]
        if unroll:
            for block in range(count):
                carry, _ = add(carry, block)
            return carry
        return jax.lax.scan(add, carry, jnp.arange(count))[0]

    @property
    def _null_rows(self) -> bool:
        """Whether the guiding rows are those of the null token."""
        return self.guided and not isinstance(self.model, GuidedPair)

    def _call(self, method: str, *args: Any) -> Any:
        return self.model.apply({"params": self.params}, *args, method=method)


def clean_timestep(
    model: MADFormer | GuidedPair, coefficients: solvers.Coefficients, context_noise: int = 0
) -> int | float | Array:
    """Returns the timestep with which finished blocks are embedded.

    It is that of the last evaluation if `model.config.clean_timestep` is "noisy", and otherwise that of the
    noise on the context, which is 0 by default.
    """
    if model.config.clean_timestep != "noisy":
        return context_noise
    timestep: Any = coefficients.level.t[-1]
    return timestep if isinstance(timestep, Array) else timestep.item()


def context_level(schedule: Schedule, timestep: int) -> NoiseLevel | None:
    """Returns the level of noise on the context, as Python numbers; None for timestep 0, which is no noise."""
    if not timestep:
        return None
    return NoiseLevel(*(float(x[0]) for x in schedule.level(np.array([timestep]))))


def _step_noise(keys: Array | None, block: int | Array, index: Any, shape: tuple[int, ...]) -> Array:
    """Draws the noise of an evaluation for each image: a function of its key, the block and the index.

    Raises:
      ValueError: There are no keys.
    """
    if keys is None:
        raise ValueError("keys is None: stochastic solvers and context_noise need the random key of each image")

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
    order: Order | None = None,
    kept_blocks: Float[Array, "B K positions C"] | None = None,
    *,
    solver: str,
    spacing: str,
    steps: int | tuple[int, ...],
    schedule: Schedule = schedules.DEFAULT,
    guidance: float | np.ndarray | Array = 1.0,
    clip_x0: float = 0.0,
    context_noise: int = 0,
    unroll: bool = False,
    padded: solvers.PaddedCoefficients | None = None,
) -> Float[Array, "B L positions C"]:
    """Generates latent blocks from noise, one block after the other.

    The function is pure. Keyword arguments other than `guidance` and `padded` are static under jit.

    Args:
      model: The model, or a model with its guide. The guide then takes the place of the null token.
      params: Its parameters, see `models.inference_params`.
      noise: Standard normal noise `(B, L, positions, C)`, in raster order like the result.
      tokens: Text tokens `(B, T)` of a conditional model. `model.config.null_token` stands for no text.
      lengths: Number of tokens of each text, `(B,)`; the rest is padding. By default all T tokens
        are text.
      keys: Random key of each image, `(B,)`. Stochastic solvers and `context_noise` need them.
      order: Raster number of the block generated r-th, for each r: `(L,)` or, of each image, `(B, L)`.
        By default `model.config.default_order`.
      kept_blocks: Clean blocks `(B, K, positions, C)`, K < L, which are the first of the order. Sampling
        caches them and generates the others.
      solver: A name of `choices.SOLVERS`.
      spacing: See `Schedule.solver_timesteps`.
      steps: Number of solver steps of each block, or one number per block.
      schedule: The noise path.
      guidance: Scale w of classifier-free guidance, or one scale per evaluation `(evaluations,)`,
        see `guidance.guidance_scales`. `(L, evaluations)` if blocks differ in steps, with padding.
        The output is unconditional + w (conditional - unconditional), for eps, v and x0 alike. The
        Python number 1 skips the unconditional rows. An array never skips them, because the program
        does not know its values.
      clip_x0: Bound of the predicted clean latent; 0 for none.
      context_noise: Timestep of the noise on finished blocks that later blocks read; 0 for none. The
        returned blocks have no noise. It needs `keys`.
      unroll: Compiles one copy of the program per block and solver step in place of loops, to count
        its cost.
      padded: Coefficients in place of those that `spacing`, `steps` and `schedule` give, for a program
        that serves many numbers of steps. An array `guidance` has their size.

    Returns:
      Latent blocks `(B, L, positions, C)`.
    """
    method = solvers.make(solver)
    blocks, first = noise.shape[1], 0 if kept_blocks is None else kept_blocks.shape[1]
    order = model.config.default_order if order is None else order
    noise = block_order.to_generation_order(noise, order)
    by_block = not isinstance(steps, int)
    if padded is None:
        tables = block_tables.make(method, schedule, spacing, steps if isinstance(steps, tuple) else (steps,))
    else:
        tables = block_tables.BlockTables(*jax.tree.map(lambda x: jnp.asarray(x)[None], padded))
    common_table = 0 if padded is None else jnp.zeros((), jnp.int32)
    evaluations = tables.rows.index.shape[1]
    has_guide = tokens is not None or isinstance(model, GuidedPair)
    guided = has_guide and (isinstance(guidance, Array | np.ndarray) or guidance != 1.0)
    clean_t = clean_timestep(model, tables.block(common_table), context_noise)
    common_steps = BlockSteps(model, params, method, guided, clip_x0, clean_t, context_level(schedule, context_noise))

    def sample_block(carry: tuple[Cache, Stream], block: int | Array) -> tuple[tuple[Cache, Stream], Array]:
        cache, pred = carry
        table = block if by_block else common_table
        coefficients, last = tables.block(table), tables.last(table)
        block_steps = common_steps._replace(clean_timestep=clean_timestep(model, coefficients, context_noise))
        condition, cache = block_steps.condition(cache, pred, block)

        def evaluate(
            carry: tuple[solvers.SolverState, Cache | None], row_and_scale: tuple[solvers.Coefficients, Array]
        ) -> tuple[tuple[solvers.SolverState, Cache | None], None]:
            (state, written), (row, w) = carry, row_and_scale
            latest = cache if written is None else written
            state, kv = block_steps.step(latest, condition, state, row, w, block, keys, returns_kv=True)
            return (state, written if written is None else block_steps.cache_noisy(written, kv, block)), None

        scales = jnp.asarray(guidance, jnp.float32)
        if by_block:
            scales = jnp.broadcast_to(scales, (blocks, evaluations))[block, : len(coefficients.index)]
        scales = jnp.broadcast_to(scales, coefficients.index.shape)
        rows = (jax.tree.map(jnp.asarray, coefficients), scales)
        state = method.init(jax.lax.dynamic_slice_in_dim(noise, block, 1, axis=1))
        # Where the attention writes the block's keys into the cache, a loop that carries it does not copy it.
        state_and_cache = state, cache if model.config.attention.unrolls_layers else None
        # The last evaluation is outside the scan because `cache_clean` may need its keys and values.
        if isinstance(last, int):
            first_rows = jax.tree.map(lambda r: r[:-1], rows)
            unrolled = evaluations if unroll else 1
            state_and_cache, _ = jax.lax.scan(evaluate, state_and_cache, first_rows, unroll=unrolled)
        else:

            def evaluate_row(k: Array, carry: tuple[solvers.SolverState, Cache | None]) -> Any:
                return evaluate(carry, jax.tree.map(lambda r: r[k], rows))[0]

            state_and_cache = jax.lax.fori_loop(0, last, evaluate_row, state_and_cache)
        state, written = state_and_cache
        cache = cache if written is None else written
        last_row, w = jax.tree.map(lambda r: r[last], rows)
        state, kv = block_steps.step(cache, condition, state, last_row, w, block, keys)
        z = state.x

        def cache_clean(cache: Cache, pred: Stream) -> tuple[Cache, Stream]:
            return block_steps.cache_clean(cache, z, kv, block, keys)

        if isinstance(block, int):
            return (cache_clean(cache, pred) if block + 1 < blocks else carry), z
        return jax.lax.cond(block + 1 < blocks, cache_clean, lambda *same: same, cache, pred), z

    carry = common_steps.begin(noise, tokens, lengths, order)
    finished = []
    if kept_blocks is not None:
        carry, finished = common_steps.cache_kept_blocks(*carry, kept_blocks, keys, unroll), [kept_blocks]
    if blocks == 1 or unroll:
        for block in range(first, blocks):
            carry, z = sample_block(carry, block)
            finished.append(z)
        return block_order.to_raster_order(jnp.concatenate(finished, axis=1), order)
    _, z = jax.lax.scan(sample_block, carry, jnp.arange(first, blocks))
    z = jnp.swapaxes(z[:, :, 0], 0, 1)
    return block_order.to_raster_order(jnp.concatenate([*finished, z], axis=1) if finished else z, order)
