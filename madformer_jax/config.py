"""The configuration schema: defaults, and validation with one-line errors.

A config is read once, at the edge: modules below take plain values. `base()` holds every field that exists, with the
default for new training; `weights.release_config` has the PyTorch release's choices for the same model.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from madformer_jax.errors import ConfigError
from madformer_jax.sizes import SCALING_FACTOR, Sizes, sizes_of


def base() -> ConfigDict:
    """Every field of a config with its default: the sound choice for new training where the release is odd."""
    c = ConfigDict()
    c.seed = 0
    c.platform = ""  # "cpu", "gpu", "tpu": refuse to start on anything else; "" takes what JAX finds
    c.compilation_cache = "auto"  # compiled programs are kept in the user's cache folder; "off", or a folder
    c.profile = ""  # "100:103": write a profiler trace of these training steps to workdir/profile

    c.model = ConfigDict()
    c.model.width = 1152  # d
    c.model.heads = 18  # head size is width / heads
    c.model.depth = 28  # N, decoder layers
    c.model.diffusion_depth = 14  # D, of them run at every denoising step (paper Table 1)
    c.model.mlp_width = 4096  # SwiGLU hidden
    c.model.blocks = 16  # L, AR length; a square number, or twice one (paper Table 2)
    c.model.unet_channels = (512, 1024)
    c.model.unet_layers = 2  # ResNet blocks a stage going down; one more going up
    c.model.unet_attention = (False, True)  # self-attention after each ResNet block of the stage
    c.model.unet_groups = 8
    c.model.unet_heads = 8
    c.model.unet_time_width = 128
    c.model.unet_stride = 2  # of the convolution between two stages; 1 keeps a token for every latent position
    c.model.rope = "axial"  # "axial": each axis turns its own half of a head; "release": the release's mixing
    c.model.time_embedding = "sinusoidal"  # or "raw" (release): the timestep itself as one number 0..999
    c.model.clean_timestep = "zero"  # timestep given to clean blocks; "noisy" (release): that of the noisy block
    c.model.hidden_from = "condition"  # what the hidden term reads; "noisy" (release): condition + embedded noisy block
    c.model.clean_stream = True  # paper Table 3; False is the release's clear_clean
    c.model.ar_condition = True  # paper Table 3; False is the release's clear_cond
    c.model.param_sets = "separate"  # towers of the clean and the noisy stream; or "shared" (paper Table 4)
    c.model.diffusion_attention = "sequence"  # or "block" (release: denoising_mlp; paper Table 5)
    c.model.classes = 0  # 0: unconditional; else one label token per image, and one more label for "none"
    c.model.text_length = 1  # T, tokens of the text stream; a data source's "label" holds as many
    c.model.attention = "auto"  # implementation of skip-causal attention: auto, reference, blocks, cudnn, splash
    c.model.dtype = "float32"  # of the computation, or "bfloat16"; parameters are always float32
    c.model.remat = "none"  # what the backward pass recomputes: none, dots, full (docs/performance.md)
    c.model.scan_unroll = 1  # layers per iteration of the scan over layers

    c.loss = ConfigDict()  # weights lambda of the four terms (paper Table 6)
    c.loss.image = 1.0
    c.loss.hidden = 0.1
    c.loss.clean = 0.0
    c.loss.text = 0.0

    c.codec = ConfigDict()
    c.codec.name = "vae"  # image <-> latent: "vae" (AutoencoderKL) or "pixel" (space-to-depth, no learned part)
    c.codec.patch = 2  # pixel: side of the square of pixels that becomes one latent position
    c.codec.path = ""  # vae: a diffusers folder, a hub id or an Orbax folder made by --mode=convert
    c.codec.scaling_factor = (
        SCALING_FACTOR  # vae: what its latents are multiplied by; a VAE that says another is refused
    )
    c.codec.dtype = "float32"  # of the VAE's computation

    c.data = ConfigDict()
    c.data.source = "digits"  # digits | folder | tfds:<name> | webdataset | arrayrecord (docs/data.md)
    c.data.path = ""  # folder of images, tars or records; tfds: its data_dir
    c.data.split = "train"  # train | test, which training never sees | all; tfds has its own, prepared records theirs
    c.data.test_share = 0.05  # of folder and webdataset, by a hash of each name; digits hold out a fifth
    c.data.image_size = 256
    c.data.channels = 3
    c.data.crop = True  # centre crop to a square after the resize of the shorter side; False squeezes
    c.data.background = "white"  # what shows behind transparent pixels: a name, or "#rrggbb"
    c.data.max_corrupt = (
        0.05  # share of records that training passes over because they cannot be read; more is an error
    )
    c.data.flip = False  # random horizontal flip
    c.data.workers = 0  # worker processes that read and decode; 0: in the training process

    c.prepare = ConfigDict()  # --mode=prepare, which writes to the workdir (docs/data.md)
    c.prepare.kind = "images"  # or "latents": the VAE's mean and log-variance
    c.prepare.shard = 1024  # source images a shard: what is done again after a kill, at most
    c.prepare.batch = 16  # images encoded at once
    c.prepare.max_corrupt = 0.05  # share of undecodable images that is still skipped; more is an error
    c.prepare.flip = False  # a flipped copy of each image as well

    c.train = ConfigDict()
    c.train.batch = 64  # images a step, over all devices
    c.train.steps = 1000
    c.train.accumulate = 1  # microbatches whose gradients are averaged into one step
    c.train.ema_decay = 0.9999
    c.train.ema_warmup = True  # decay min(target, (1 + step) / (10 + step)); False (release): constant
    c.train.label_dropout = 0.1  # share of labels replaced by "none", for guidance
    c.train.log_every = 50
    c.train.sample_every = 0  # steps between sample grids; 0: only at the end
    c.train.checkpoint_every = 1000
    c.train.keep = 3  # newest checkpoints kept
    c.train.keep_every = 0  # and for ever those at multiples of this step; 0: none

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 3e-4
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.05
    c.optimizer.clip = 1.0  # global gradient norm; 0: off
    c.optimizer.schedule = "wsd"  # wsd | cosine | constant
    c.optimizer.warmup = 0.01  # share of the steps, linear
    c.optimizer.decay = 0.15  # wsd: share of the steps at the end in which the rate falls to 2^-6

    c.sample = ConfigDict()
    c.sample.n = 64
    c.sample.batch = 64  # images drawn at once, over all devices
    c.sample.grid = 64  # the first images, shown in the PNG of a sampling and of a training's step
    c.sample.solver = "dpmpp_2m"  # ddim | dpmpp_2m
    c.sample.spacing = "trailing"  # trailing | leading | linspace
    c.sample.steps = 50
    c.sample.guidance = 1.0  # classifier-free guidance scale; 1: off
    c.sample.labels = ""  # "" runs through all classes in turn; or "3", "0,1,2"
    c.sample.weights = "ema"  # ema | raw
    c.sample.noise = ""  # .npy file of the initial noise (n, L, positions, C) in place of the seed's
    c.sample.clip = 0.0  # bound of the predicted clean latent; 0: off (1 for pixels)

    c.convert = ConfigDict()  # --mode=convert: one of the first four
    c.convert.release = ""  # the release's checkpoint, to a workdir
    c.convert.vae = ""  # a diffusers folder or hub id, to workdir/vae
    c.convert.inception = ""  # FID's Inception checkpoint, to workdir/inception
    c.convert.to_release = ""  # file to write from the workdir's newest checkpoint
    c.convert.weights = ""  # "ema" or "model", where there are both; "" reads the EMA, writes what sample.weights says

    c.benchmark = ConfigDict()  # --mode=benchmark
    c.benchmark.parts = "train,sample,data"  # what to measure, some of these
    c.benchmark.warmup = 1  # runs before those that count
    c.benchmark.steps = 5  # runs whose median counts

    c.mesh = ConfigDict()  # devices along each axis; -1 takes what is left
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.tensor = 1
    return c.lock()  # a misspelt field is an error, in a config file too


def flat(c: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Field -> value, as in {"model.width": 96}; sequences are tuples."""
    fields: dict[str, Any] = {}
    for name, value in c.items():
        if isinstance(value, Mapping | ConfigDict):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = tuple(value) if isinstance(value, list) else value
    return fields


def differences(c: ConfigDict) -> dict[str, Any]:
    """The fields in which a config differs from the defaults, with its values."""
    defaults = flat(base())
    return {name: value for name, value in flat(c).items() if name not in defaults or value != defaults[name]}


def variant(text: str, numbers: dict[str, int], words: tuple[str, ...] = ()) -> dict[str, int]:
    """Reads a config file's argument, as in `ffhq1024.py:D=7,tiny`.

    Args:
      text: what stands behind the colon; "" for none.
      numbers: the names that take a number, with their defaults.
      words: the names that stand alone.

    Returns:
      The value of each name; of `words`, 1 for those that are there and 0 for the others.

    Raises:
      ConfigError: a name is unknown or its value no number.
    """
    chosen = numbers | dict.fromkeys(words, 0)
    for part in text.split(",") if text else ():
        name, given, value = part.partition("=")
        if name in numbers and value.isdecimal():
            chosen[name] = int(value)
        elif name in words and not given:
            chosen[name] = 1
        else:
            known = ", ".join([*(f"{name}=<number>" for name in numbers), *words])
            raise ConfigError(f"--config: variant {part!r} is unknown: it is made of {known}, separated by commas.")
    return chosen


def as_tiny(c: ConfigDict) -> None:
    """Shrinks a large config to a few steps of a small model on the embedded digits, D and L in proportion."""
    share = c.model.diffusion_depth / c.model.depth
    c.model.depth = 4
    c.model.diffusion_depth = max(1, round(share * c.model.depth))
    c.model.width, c.model.heads, c.model.mlp_width = 64, 4, 128
    c.model.unet_channels, c.model.unet_layers, c.model.unet_time_width = (16, 32), 1, 32
    c.model.classes = min(c.model.classes, 10)
    c.codec.name, c.codec.patch = "pixel", 2  # no VAE is needed
    c.data.source, c.data.image_size, c.data.channels = "digits", 32, 1
    c.train.steps, c.train.log_every, c.train.sample_every = 20, 5, 0
    c.train.batch = c.sample.n = c.sample.batch = 16
    c.sample.steps = 4


@dataclasses.dataclass(frozen=True)
class _Choice:
    field: str
    values: tuple[str, ...]


_CHOICES = (
    _Choice("platform", ("", "cpu", "gpu", "tpu")),
    _Choice("model.rope", ("axial", "release")),
    _Choice("model.time_embedding", ("sinusoidal", "raw")),
    _Choice("model.clean_timestep", ("zero", "noisy")),
    _Choice("model.hidden_from", ("condition", "noisy")),
    _Choice("model.param_sets", ("separate", "shared")),
    _Choice("model.diffusion_attention", ("sequence", "block")),
    _Choice("model.attention", ("auto", "reference", "blocks", "cudnn", "splash")),
    _Choice("model.dtype", ("float32", "bfloat16")),
    _Choice("model.remat", ("none", "dots", "full")),
    _Choice("codec.name", ("pixel", "vae")),
    _Choice("codec.dtype", ("float32", "bfloat16")),
    _Choice("prepare.kind", ("images", "latents")),
    _Choice("optimizer.schedule", ("wsd", "cosine", "constant")),
    _Choice("sample.solver", ("ddim", "dpmpp_2m")),
    _Choice("sample.spacing", ("trailing", "leading", "linspace")),
    _Choice("sample.weights", ("ema", "raw")),
    _Choice("convert.weights", ("", "ema", "model")),
)

# field -> smallest and largest value
_RANGES: dict[str, tuple[float, float]] = {
    "model.width": (1, math.inf),
    "model.heads": (1, math.inf),
    "model.depth": (1, math.inf),
    "model.mlp_width": (1, math.inf),
    "model.unet_layers": (1, math.inf),
    "model.unet_groups": (1, math.inf),
    "model.unet_heads": (1, math.inf),
    "model.unet_time_width": (2, math.inf),
    "model.unet_stride": (1, 2),
    "model.classes": (0, math.inf),
    "model.text_length": (1, math.inf),
    "model.scan_unroll": (1, math.inf),
    "loss.image": (0, math.inf),
    "loss.hidden": (0, math.inf),
    "loss.clean": (0, math.inf),
    "loss.text": (0, math.inf),
    "codec.scaling_factor": (1e-6, math.inf),
    "data.channels": (1, math.inf),
    "data.test_share": (0, 1),
    "data.max_corrupt": (0, 1),
    "data.workers": (0, math.inf),
    "prepare.shard": (1, math.inf),
    "prepare.batch": (1, math.inf),
    "prepare.max_corrupt": (0, 1),
    "train.batch": (1, math.inf),
    "train.steps": (1, math.inf),
    "train.accumulate": (1, math.inf),
    "train.ema_decay": (0, 1),
    "train.label_dropout": (0, 1),
    "train.log_every": (1, math.inf),
    "train.sample_every": (0, math.inf),
    "train.checkpoint_every": (1, math.inf),
    "train.keep": (1, math.inf),
    "train.keep_every": (0, math.inf),
    "optimizer.learning_rate": (0, math.inf),
    "optimizer.b1": (0, 1),
    "optimizer.b2": (0, 1),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.clip": (0, math.inf),
    "optimizer.warmup": (0, 1),
    "optimizer.decay": (0, 1),
    "sample.n": (1, math.inf),
    "sample.batch": (1, math.inf),
    "sample.grid": (1, math.inf),
    "sample.steps": (1, 999),
    "sample.guidance": (0, 1000),
    "sample.clip": (0, math.inf),
    "benchmark.warmup": (0, math.inf),
    "benchmark.steps": (1, math.inf),
}


def validate(c: ConfigDict) -> Sizes:
    """Checks a whole config and returns its sizes.

    Raises:
      ConfigError: one line on the first setting that is wrong.
    """

    def get(field: str) -> Any:
        value: Any = c
        for name in field.split("."):
            value = value[name]
        return value

    for choice in _CHOICES:
        if get(choice.field) not in choice.values:
            allowed = ", ".join(repr(v) for v in choice.values)
            raise ConfigError(f"config.{choice.field}={get(choice.field)!r} is unknown: one of {allowed}.")
    for field, (low, high) in _RANGES.items():
        if not low <= get(field) <= high:
            bound = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ConfigError(f"config.{field}={get(field)} is out of range: it must be {bound}.")
    m = c.model
    if not 1 <= m.diffusion_depth <= m.depth:
        raise ConfigError(
            f"config.model.diffusion_depth={m.diffusion_depth} (D) must be from 1 to config.model.depth={m.depth} (N)."
        )
    if m.width % m.heads or (m.width // m.heads) % 4:
        raise ConfigError(
            f"config.model.width={m.width} over config.model.heads={m.heads} must give a head size that is a multiple of 4."
        )
    if len(m.unet_channels) != len(m.unet_attention) or not m.unet_channels:
        raise ConfigError("config.model.unet_channels and config.model.unet_attention need one entry for each stage.")
    for channels in m.unet_channels:
        if channels % m.unet_groups or channels % m.unet_heads:
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
    if c.loss.text and not (m.classes and m.text_length > 1):
        raise ConfigError(
            "config.loss.text needs text to predict: config.model.classes > 0 and config.model.text_length of 2 or more."
        )
    if not any(c.loss.values()):
        raise ConfigError("all weights in config.loss are 0: nothing would be trained.")
    if c.train.batch % c.train.accumulate:
        raise ConfigError(
            f"config.train.batch={c.train.batch} is not a multiple of config.train.accumulate={c.train.accumulate}."
        )
    if c.sample.guidance != 1.0 and not m.classes:
        raise ConfigError(
            f"config.sample.guidance={c.sample.guidance} needs a class-conditional model (model.classes)."
        )
    labels(c)
    return sizes_of(c)


def labels(c: ConfigDict) -> list[int]:
    """The class of each of the `sample.n` images: `sample.labels` repeated in turn; empty without classes.

    Raises:
      ConfigError: a label is no class of the model.
    """
    if not c.model.classes:
        if c.sample.labels:
            raise ConfigError("config.sample.labels needs a class-conditional model (model.classes).")
        return []
    text = c.sample.labels or ",".join(str(k) for k in range(c.model.classes))
    try:
        chosen = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"config.sample.labels={text!r} must be class numbers separated by commas.") from None
    wrong = [k for k in chosen if not 0 <= k < c.model.classes]
    if wrong:
        raise ConfigError(f"config.sample.labels: {wrong[0]} is no class; they run from 0 to {c.model.classes - 1}.")
    return [chosen[i % len(chosen)] for i in range(c.sample.n)]
