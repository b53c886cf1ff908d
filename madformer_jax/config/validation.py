"""Checks of the values of a config: each field against `config.table`, and rules between fields.

`schema.validate` calls `check`. A new rule between several fields is a function here.
"""

import math
import unicodedata
from typing import Any

from ml_collections import ConfigDict

from madformer_jax.config import block_orders, block_steps, class_labels, elastic_depth, fields
from madformer_jax.config.choices import LOSS_TERMS, NOISE_PATHS
from madformer_jax.config.shapes import derive_sizes, vocabulary_size
from madformer_jax.config.table import FIELDS, PATH, Field
from madformer_jax.errors import ConfigError

_UNCONDITIONAL = {
    "sample.guidance": 1.0,
    "sample.guidance_schedule": "constant",
    "sample.guidance_interval": (0, 999),
    "sample.label_sampling": "balanced",
}

TRACKERS = ("tensorboard", "trackio", "wandb")  # choices of train.log_to
_BUCKET_SCHEMES = ("gs", "s3", "az", "hf")  # schemes that epath knows
_MAX_INT32 = 2**31 - 1  # JAX's integers have 32 bits


def check_path(name: str, path: str) -> None:
    """Checks that a value can be a path.

    Control characters are refused because messages have one line. Bytes that are not UTF-8 (surrogates
    in Python) are refused because most libraries do not support them.

    Args:
      name: Flag or field, for the message.
      path: The value.

    Raises:
      ConfigError: The value is not a path, or is not supported.
    """
    scheme, remote, _ = path.partition("://")
    if remote and scheme not in _BUCKET_SCHEMES:
        raise ConfigError(
            f"{name}={path!r} has an unknown scheme: use a local path, or one of {', '.join(_BUCKET_SCHEMES)}."
        )
    if path.lower() in ("none", "null", "true", "false"):
        raise ConfigError(f"{name}={path!r} is not a path. Leave it empty ({name}=) if none is meant.")
    wrong = [character for character in path if unicodedata.category(character) in ("Cc", "Cs")]
    if wrong:
        raise ConfigError(f"{name}={path!r}: {wrong[0]!r} is not supported in a path. Rename the file or folder.")


def _check_value(name: str, value: Any, field: Field) -> None:
    """Checks a value against the table's line for its field.

    Raises:
      ConfigError: It is none of the choices, out of range, or not a path.
    """
    if field.choices and value not in field.choices:
        raise ConfigError(f"{name}={value!r} is unknown: one of {', '.join(map(repr, field.choices))}.")
    if field.has_range and not field.low <= value <= field.high:
        bound = f"at least {field.low}" if field.high == math.inf else f"from {field.low} to {field.high}"
        raise ConfigError(f"{name}={value} is out of range: it must be {bound}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value} must be a finite number.")
    if isinstance(value, int) and field.high == math.inf and abs(value) > _MAX_INT32:
        raise ConfigError(f"{name}={value} is out of range: it must be at most {_MAX_INT32}.")
    if PATH in field.facts:
        check_path(name, value)


def check(c: ConfigDict) -> None:
    """Checks the values of a config that has all fields.

    Raises:
      ConfigError: Names the first wrong setting.
    """
    values = fields.flat(c)
    for name, row in FIELDS.items():
        _check_value(f"config.{name}", values[name], row)
    check_depth(c)
    elastic_depth.check(c)
    m = c.model
    if m.width % m.heads or (m.width // m.heads) % 4:
        raise ConfigError(
            f"config.model.width={m.width} over config.model.heads={m.heads} must give a head size that is a multiple of 4."
        )
    if len(m.unet_channels) != len(m.unet_attention) or not m.unet_channels:
        raise ConfigError("config.model.unet_channels and config.model.unet_attention need one entry for each stage.")
    for channels in m.unet_channels:
        if channels < 1 or channels % m.unet_groups or channels % m.unet_heads:
            raise ConfigError(
                f"config.model.unet_channels={tuple(m.unet_channels)} must be multiples of "
                f"unet_groups={m.unet_groups} and unet_heads={m.unet_heads}."
            )
    if m.time_embedding == "sinusoidal" and m.unet_time_width % 2:
        raise ConfigError(f"config.model.unet_time_width={m.unet_time_width} must be even for a sinusoidal embedding.")
    if c.loss.clean and not m.clean_stream:
        raise ConfigError(
            "config.loss.clean needs config.model.clean_stream=True: there is no clean output without it."
        )
    _check_text(c)
    if c.train.context_noise and m.clean_timestep == "noisy":
        raise ConfigError(
            f"config.train.context_noise={c.train.context_noise} needs config.model.clean_timestep='zero': the model needs "
            "the timestep of its context."
        )
    _check_context(c)
    if c.sample.context_noise > c.train.context_noise:
        raise ConfigError(
            f"config.sample.context_noise={c.sample.context_noise} is more than the model has trained with: use at most "
            f"config.train.context_noise={c.train.context_noise}."
        )
    if not any(c.loss[term] for term in LOSS_TERMS):
        raise ConfigError("all weights in config.loss are 0: nothing would be trained.")
    if c.train.batch % c.train.accumulate:
        raise ConfigError(
            f"config.train.batch={c.train.batch} is not a multiple of config.train.accumulate={c.train.accumulate}."
        )
    for field, neutral in _UNCONDITIONAL.items():
        known = m.classes if field == "sample.label_sampling" else vocabulary_size(c) or c.sample.guide
        if values[field] != neutral and not known:
            raise ConfigError(
                f"config.{field}={values[field]} needs a class-conditional model (model.classes), or one that reads captions "
                "(text.vocabulary)."
            )
    interval = values["sample.guidance_interval"]
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 999:
        raise ConfigError(
            f"config.sample.guidance_interval={interval} must be the lowest and the highest timestep with guidance, from 0 to "
            "999, as in (200, 600)."
        )
    for field, action in (("keep_every", "kept"), ("evaluate_every", "scored"), ("ema_snapshots", "snapshots")):
        if c.train[field] % c.train.checkpoint_every:
            raise ConfigError(
                f"config.train.{field}={c.train[field]} is not a multiple of config.train.checkpoint_every="
                f"{c.train.checkpoint_every}: only steps that are saved can be {action}."
            )
    if unknown := {name.strip() for name in c.train.log_to.split(",") if name.strip()} - set(TRACKERS):
        raise ConfigError(
            f"config.train.log_to={c.train.log_to!r}: {min(unknown)!r} is unknown: names of {', '.join(TRACKERS)}, with commas."
        )
    profiled_steps(c)
    _check_sampling(c)
    block_orders.check(c)
    _check_codec(c)


def _check_context(c: ConfigDict) -> None:
    """Checks that `train.own_context` and `train.context_noise` have an effect, and that the model can make rollouts."""
    steps, m = c.train.own_context_steps, c.model
    # The same rule as that of `models.plan.training_plan`, which this package may not import.
    reads_context = (
        m.ar_condition or c.loss.hidden or c.loss.clean or (m.clean_stream and m.diffusion_attention == "sequence")
    )
    for field in ("own_context", "context_noise"):
        value = c.train[field]
        if value and m.blocks == 1:
            raise ConfigError(
                f"config.train.{field}={value:g} has no effect with config.model.blocks=1: no block comes before another. "
                f"Set {field} to 0, or use more blocks."
            )
        if value and not reads_context:
            raise ConfigError(
                f"config.train.{field}={value:g} has no effect: no layer reads clean blocks. Set {field} to 0, or use "
                "config.model.ar_condition=True, or config.model.clean_stream=True with "
                "config.model.diffusion_attention='sequence'."
            )
    if steps > 1 and not c.train.own_context:
        raise ConfigError(
            f"config.train.own_context_steps={steps} has no effect with config.train.own_context=0: set own_context to a share "
            "of the examples, e.g. 0.5."
        )
    if steps > 1 and not m.clean_stream and m.diffusion_attention != "block":
        raise ConfigError(
            f"config.train.own_context_steps={steps} needs config.model.clean_stream=True: without it the diffusion layers read "
            "earlier noisy blocks, and a rollout has no true blocks for them. Use config.train.own_context_steps=1."
        )


def _check_codec(c: ConfigDict) -> None:
    """Checks the sizes of a VAE and the scale of its latents."""
    if c.codec.name == "vae" and c.codec.downsampling.bit_count() != 1:
        raise ConfigError(f"config.codec.downsampling={c.codec.downsampling} must be a power of 2 for a VAE.")
    if c.codec.shift_factor and not c.codec.scaling_factor:
        raise ConfigError(
            f"config.codec.shift_factor={c.codec.shift_factor} needs config.codec.scaling_factor: 0 takes both from the VAE."
        )


def _check_text(c: ConfigDict) -> None:
    """Checks the fields of captions, which need a vocabulary."""
    vocabulary, length = c.text.vocabulary, c.text.length
    if vocabulary and c.model.classes:
        raise ConfigError(
            f"config.text.vocabulary={vocabulary} and config.model.classes={c.model.classes}: a model reads captions or "
            "classes; set one of them to 0."
        )
    if vocabulary and length < 3:
        raise ConfigError(f"config.text.length={length}: a caption has a begin, a token and an end: use at least 3.")
    for field, neutral in (("length", 1), ("tokenizer", ""), ("caption", "caption"), ("truncate", False)):
        if not vocabulary and c.text[field] != neutral:
            raise ConfigError(
                f"config.text.{field}={c.text[field]!r} needs captions: set config.text.vocabulary, the tokenizer's number of "
                "tokens."
            )
    if c.sample.prompts and not vocabulary:
        raise ConfigError("config.sample.prompts needs a model that reads captions (text.vocabulary).")
    if c.loss.text and not vocabulary:
        raise ConfigError(
            f"config.loss.text={c.loss.text} needs captions (text.vocabulary): a class has no tokens to predict."
        )


def _check_sampling(c: ConfigDict) -> None:
    """Checks labels, and that the noise path has the timesteps of the solver and of training."""
    s = c.sample
    if s.labels and not c.model.classes:
        raise ConfigError("config.sample.labels needs a class-conditional model (model.classes).")
    if s.ema and s.weights != "ema":
        raise ConfigError(f"config.sample.ema={s.ema:g} is an average: it needs config.sample.weights='ema'.")
    class_labels.check(s.labels, c.model.classes)  # class names are resolved later, with the data
    d = c.diffusion
    if d.path == "ddpm" and (d.time_sampling != "uniform" or d.shift != 1):
        raise ConfigError(
            f"config.diffusion.time_sampling={d.time_sampling!r} with config.diffusion.shift={d.shift:g} needs a continuous "
            f"path: set config.diffusion.path={' or '.join(path for path in NOISE_PATHS if path != 'ddpm')}."
        )
    if d.path != "ddpm" and s.spacing != "trailing":
        raise ConfigError(
            f"config.sample.spacing={s.spacing!r} needs config.diffusion.path='ddpm': use trailing for {d.path!r}."
        )
    if s.steps > max_solver_steps(c):
        raise ConfigError(
            f"config.sample.steps={s.steps} is out of range: it must be from 1 to {max_solver_steps(c)} for "
            f"config.diffusion.path={d.path!r}."
        )
    if s.steps_by_block != block_steps.CONSTANT:
        derive_sizes(c)  # a wrong number of blocks is the error to show
    steps_of_blocks = {s.steps} if s.steps_by_block == block_steps.CONSTANT else set(block_steps.steps_of_blocks(c))
    if max(steps_of_blocks) > max_solver_steps(c):
        raise ConfigError(
            f"config.sample.steps_by_block={s.steps_by_block!r} with config.sample.steps={s.steps} gives a block "
            f"{max(steps_of_blocks)} steps: it must be from 1 to {max_solver_steps(c)} for config.diffusion.path={d.path!r}."
        )
    if s.solver != "dpmpp_2m" and s.spacing != "trailing" and 1 in steps_of_blocks:
        raise ConfigError(
            f"a block of 1 step with config.sample.solver={s.solver!r} and config.sample.spacing={s.spacing!r} starts at t = 0 "
            "and returns noise. Use config.sample.spacing=trailing, or 2 steps or more."
        )


def max_solver_steps(c: ConfigDict) -> int:
    """Returns the upper limit of `sample.steps`: the ddpm path has 1000 timesteps, others have no such limit."""
    return 999 if c.diffusion.path == "ddpm" else int(FIELDS["sample.steps"].high)


def check_depth(c: ConfigDict) -> None:
    """Checks the number of diffusion layers D against the number of layers N.

    Raises:
      ConfigError: D is not from 1 to N.
    """
    m = c.model
    if not 1 <= m.diffusion_depth <= m.depth:
        raise ConfigError(
            f"config.model.diffusion_depth={m.diffusion_depth} (D) must be from 1 to config.model.depth={m.depth} (N)."
        )


def profiled_steps(c: ConfigDict) -> tuple[int, int] | None:
    """Returns the first and last step of `profile`, or None if nothing is profiled.

    Raises:
      ConfigError: The value is not a range of steps, or training ends before them.
    """
    if not c.profile:
        return None
    first, _, last = c.profile.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise ConfigError(f"config.profile={c.profile!r} must be a first and a last step, as in '100:103'.")
    if int(last) >= c.train.steps:
        raise ConfigError(
            f"config.profile={c.profile!r}: the last step is {c.train.steps - 1} (config.train.steps={c.train.steps})."
        )
    return int(first), int(last)


def warnings(c: ConfigDict) -> list[str]:
    """Returns a warning for each setting that is allowed but probably a mistake."""
    lines = sampling_warnings(c)
    values, channels = derive_sizes(c).channels, c.model.unet_channels[0]
    if channels < values and c.model.prediction_type != "x0":
        lines.append(
            f"config.model.unet_channels[0]={channels} is less than the {values} values of a latent position: the noise predicted "
            f"from {channels} channels cannot fill them all, and its loss stays above {1 - channels / values:.2f}; use {values} "
            "or more, or config.model.prediction_type=x0."
        )
    return lines


def sampling_warnings(c: ConfigDict) -> list[str]:
    """Returns the warnings of `warnings` that concern sampling."""
    if c.sample.guide and c.sample.guidance == 1:
        return [f"config.sample.guide={c.sample.guide} has no effect with config.sample.guidance=1: try 2."]
    if c.sample.guidance == 1 or c.train.label_dropout > 0 or c.sample.guide:
        return []
    return [
        f"config.sample.guidance={c.sample.guidance:g} with config.train.label_dropout=0: the model never trained without a "
        "label, so that guidance extrapolates from an untrained token. Use config.sample.guidance=1, or train with "
        "config.train.label_dropout=0.1."
    ]
