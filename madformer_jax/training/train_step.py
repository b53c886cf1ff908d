"""The training state, the optimizer and the training step.

`modes.train` builds the step from a config; `modes.compile` and `modes.benchmark` compile it alone.
Add schedules to `learning_rate`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict

from madformer_jax.config.shapes import Sizes, derive_sizes
from madformer_jax.diffusion import losses
from madformer_jax.diffusion import schedule as schedules
from madformer_jax.diffusion.own_context import OwnContext
from madformer_jax.models import ema, layer_split, madformer
from madformer_jax.models.madformer import MADFormer
from madformer_jax.runtime import partitioning
from madformer_jax.sampling import codec

# ---- state


class State(NamedTuple):
    """The state of training between steps. Its arrays are sharded by `partitioning.RULES`."""

    step: Array  # () int32, steps done
    params: Any  # float32
    ema: Any  # float32, exponential moving average of params
    opt: Any  # state of the optimizer
    power_ema: dict[str, Any] | None = None  # float32, the averages of `ema.PROFILES`; None without ema_snapshots


def learning_rate(c: ConfigDict) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    A linear warm-up over the fraction `warmup` of the steps is followed by a constant rate, a cosine, or WSD
    (authors' release). WSD (warm-up, stable, decay) is constant until the last fraction `decay` of
    the steps. There it falls as 0.5 ** (6 r), where r goes from 0 to 1.
    """
    o, steps = c.optimizer, c.train.steps
    rate, warmup = o.learning_rate, max(1, round(o.warmup * steps))
    remaining = max(1, steps - warmup)
    decay_steps = min(remaining, max(1, o.decay * steps))
    warm_up = optax.linear_schedule(rate / warmup, rate, max(1, warmup - 1))
    schedule = {
        "constant": optax.constant_schedule(rate),
        "cosine": optax.cosine_decay_schedule(rate, remaining),
        "wsd": optax.exponential_decay(rate, decay_steps, 0.5**6, remaining - decay_steps, end_value=rate * 0.5**6),
    }[o.schedule]
    return optax.join_schedules([warm_up, schedule], [warmup])


def optimizer(c: ConfigDict) -> optax.GradientTransformation:
    """Returns AdamW after clipping by the global norm.

    With `skip`, up to that many steps in a row whose gradients are not finite are skipped.
    """
    o = c.optimizer
    adamw = optax.adamw(learning_rate(c), b1=o.b1, b2=o.b2, weight_decay=o.weight_decay)
    tx = optax.chain(optax.clip_by_global_norm(o.clip), adamw) if o.clip else adamw
    return optax.apply_if_finite(tx, o.skip) if o.skip else tx


def create_state(
    model: MADFormer, tx: optax.GradientTransformation, seed: int, mesh: jax.sharding.Mesh, power_ema: bool = False
) -> tuple[Callable[[], State], State]:
    """Prepares the state of step 0.

    Creating the state needs no memory on the host, and on each device no more than its shards. With
    `power_ema` it holds the averages of `ema.PROFILES`.

    Returns:
      A function that creates the sharded state, and the abstract state with its shardings.

    Raises:
      ConfigError: The mesh does not split the layers evenly.
    """
    partitioning.check_tensor(mesh, model.config.heads, model.config.mlp_width)

    def boxed(key: Array) -> State:
        params = madformer.init(model, key)
        averages = [jax.tree.map(jnp.copy, params) for _ in range(1 + power_ema * len(ema.PROFILES))]
        power = dict(zip(ema.PROFILES, averages[1:])) or None
        return State(jnp.zeros((), jnp.int32), params, averages[0], tx.init(params), power)

    key = jax.random.key(seed)
    with partitioning.scope(mesh):
        abstract = jax.eval_shape(boxed, key)
    shardings = partitioning.shardings(abstract, mesh)

    # The program runs once. On a CPU, compiling it without optimization takes a quarter of the time
    # (12.8 s instead of 48.7 s for digits).
    quick = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None

    def create() -> State:
        with partitioning.scope(mesh):
            return jax.jit(lambda k: nn.meta.unbox(boxed(k)), out_shardings=shardings, compiler_options=quick)(key)

    return create, partitioning.abstract_arrays(nn.meta.unbox(abstract), shardings)


# ---- step

# (state, batch, codec params, seed) -> (state, metrics). The seed, () uint32, is an argument so
# that one program serves every seed.
StepFn = Callable[[State, dict[str, Array], Any, Any], tuple[State, dict[str, Array]]]

# (params, batch, codec params, key[, text_tokens, averages]) -> (loss, metrics), see `losses.training_loss`
LossFn = Callable[..., tuple[Array, dict[str, Array]]]


class Setup(NamedTuple):
    """The model, codec, sizes and optimizer of a training step."""

    model: MADFormer
    codec: codec.Codec
    sizes: Sizes
    tx: optax.GradientTransformation


def make_setup(c: ConfigDict) -> Setup:
    """Builds the setup of a validated config."""
    return Setup(madformer.build(c), codec.build(c), derive_sizes(c), optimizer(c))


def make_loss(s: Setup, c: ConfigDict, dropout: float) -> LossFn:
    """Returns the pure loss function of a batch.

    Args:
      s: The setup of the config. The D of its model may be another than that of the parameters.
      c: The config.
      dropout: Share of labels or captions that the null token replaces.
    """
    weights, context_noise = losses.LossWeights(**c.loss), c.train.context_noise
    path, elastic = schedules.make(**c.diffusion), c.train.elastic_depth

    def loss(
        params: Any,
        batch: dict[str, Array],
        codec_params: Any,
        key: Array,
        text_tokens: Array | None = None,
        averages: Any = None,
    ) -> tuple[Array, dict[str, Array]]:
        encode_key, drop_key, loss_key = _split_keys(key)
        if elastic:
            params, averages = (None if x is None else layer_split.fit(s.model, x) for x in (params, averages))
        with jax.named_scope("codec"):
            z = codec.to_blocks(s.codec.encode(codec_params, batch, encode_key), s.sizes)
        tokens = lengths = None
        if s.model.config.vocabulary:
            tokens, lengths = batch.get("tokens", batch["label"][:, None]), batch.get("lengths")
            drop = _dropout_mask(drop_key, dropout, len(z))
            tokens = jnp.where(drop, s.model.config.null_token, tokens)
            lengths = None if lengths is None else _caption_lengths(lengths, drop)
        own_context = None
        if averages is not None:
            own_context = OwnContext(
                averages, c.train.own_context, c.train.own_context_timestep, c.train.own_context_steps
            )
        return losses.training_loss(
            s.model, params, z, tokens, loss_key, weights, context_noise, lengths, text_tokens, path, own_context
        )

    return loss


def _split_keys(key: Array) -> Array:
    """Splits the key of a batch into keys for latents, for dropout, and for timesteps and noise."""
    return jax.random.split(key, 3)


def _dropout_mask(key: Array, dropout: float, rows: int) -> Array:
    """Draws which labels or captions the null token replaces, bool (rows, 1)."""
    return jax.random.bernoulli(key, dropout, (rows, 1))


def _caption_lengths(lengths: Array, dropped: Array) -> Array:
    """Returns the lengths of captions (b,). A dropped caption is a single null token."""
    return jnp.where(dropped[:, 0], 1, lengths)


def _mean_text_tokens(lengths: Array, keys: Array, dropout: float) -> Array:
    """Returns the mean number of predicted tokens per microbatch, after dropout.

    Args:
      lengths: Tokens of each caption, (microbatches, b).
      keys: The key of each microbatch, which its loss gets too.
      dropout: Share of captions that are dropped.
    """

    def count(microbatch: tuple[Array, Array]) -> Array:
        lengths, key = microbatch
        return losses.count_predicted_tokens(
            _caption_lengths(lengths, _dropout_mask(_split_keys(key)[1], dropout, len(lengths)))
        )

    return jnp.maximum(1, jnp.sum(jax.lax.map(count, (lengths, keys)))) / len(keys)


def make_step(s: Setup, c: ConfigDict, platform: str | None = None) -> StepFn:
    """Returns the pure training step, to be jitted with the state donated.

    The randomness of step n is a function of (seed, n) alone.

    Args:
      s: The setup of the config.
      c: The config.
      platform: cpu, gpu or tpu, on which the step will run. By default JAX's backend.
    """
    accumulate, max_decay, ema_warmup, skip = (
        c.train.accumulate, c.train.ema_decay, c.train.ema_warmup, c.optimizer.skip
    )  # fmt: skip
    schedule = learning_rate(c)
    dropout = c.train.label_dropout
    gradient = jax.grad(make_loss(s, c, dropout), has_aux=True)

    def step(state: State, batch: dict[str, Array], codec_params: Any, seed: Any) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        averages = state.ema if c.train.own_context else None
        if accumulate == 1:
            grads, metrics = gradient(state.params, batch, codec_params, key, averages=averages)
        else:
            # Consecutive rows go to different microbatches, which stay spread over the devices.
            microbatches = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            keys = jax.random.split(key, accumulate)
            lengths = microbatches.get("lengths")
            text_tokens = () if lengths is None else (_mean_text_tokens(lengths, keys, dropout),)

            def add(total: Any, inputs: tuple[Any, Array]) -> tuple[Any, dict[str, Array]]:
                microbatch, key = inputs
                grads, metrics = gradient(state.params, microbatch, codec_params, key, *text_tokens, averages=averages)
                return jax.tree.map(jnp.add, total, grads), metrics

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            # XLA for CPU compiles fast gradients of convolutions only outside of loops.
            unroll = accumulate if (platform or jax.default_backend()) == "cpu" else 1
            grads, metrics = jax.lax.scan(add, zeros, (microbatches, keys), unroll=unroll)
            grads = jax.tree.map(lambda g: g / accumulate, grads)
            metrics = {name: jnp.nanmean(values) for name, values in metrics.items()}
        with jax.named_scope("optimizer"):
            return update(state, grads, metrics)

    def update(state: State, grads: Any, metrics: dict[str, Array]) -> tuple[State, dict[str, Array]]:
        updates, opt_state = s.tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(max_decay, (1 + state.step) / (10 + state.step)) if ema_warmup else max_decay
        average = optax.incremental_update(params, state.ema, 1 - decay)
        power = state.power_ema and {
            name: ema.update(tree, params, ema.PROFILES[name], state.step + 1) for name, tree in state.power_ema.items()
        }
        # The optimizer does not count steps that it skips.
        optimizer_step = state.step - state.opt.total_notfinite if skip else state.step
        metrics |= {"grad_norm": optax.global_norm(grads), "learning_rate": schedule(optimizer_step)}
        if skip:
            metrics["skipped"] = opt_state.notfinite_count  # skipped steps in a row, up to this one
        return State(state.step + 1, params, average, opt_state, power), metrics

    return step
