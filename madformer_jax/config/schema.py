"""Schema of configs: every field with its default, and functions on whole configs.

Config files and the command line start from `base`, whose defaults suit new training;
`weights.release_config` has the settings of the PyTorch release. To add a field, add it to `base`, its
facts to `identity`, and its choices or range to `validation`. To rename a field, see `aliases`.
"""

import os
import random
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from madformer_jax.config import class_labels, fields, identity, validation
from madformer_jax.config.shapes import SCALING_FACTOR, Sizes, derive_sizes
from madformer_jax.errors import ConfigError

TOKENIZER_FILE = "tokenizer.json"  # as text.tokenizer in an export's config.json: the file next to it


def base() -> ConfigDict:
    """Returns a locked config with every field at its default.

    The comment behind a field is its description in --help and in docs/reference.md.
    """
    c = ConfigDict()
    c.seed = 0
    c.platform = ""  # required platform: "cpu", "gpu" or "tpu"; "": the one that JAX finds
    c.compilation_cache = "auto"  # folder of compiled programs, or "auto", "workdir", "off" (docs/performance.md)
    c.profile = ""  # "100:103": write a profiler trace of these training steps to workdir/profile

    c.model = ConfigDict()
    c.model.width = 1152  # d
    c.model.heads = 18  # head size is width / heads
    c.model.depth = 28  # N, decoder layers
    c.model.diffusion_depth = 14  # D, the layers of these that run at every denoising step (paper Table 1)
    c.model.mlp_width = 4096  # hidden width of the SwiGLU MLP
    c.model.blocks = 16  # L, AR length; a square number, or twice a square number (paper Table 2)
    c.model.unet_channels = (512, 1024)
    c.model.unet_layers = 2  # ResNet blocks of each downsampling stage; upsampling stages have one more
    c.model.unet_attention = (False, True)  # self-attention after each ResNet block of the stage
    c.model.unet_groups = 8
    c.model.unet_heads = 8
    c.model.unet_time_width = 128
    c.model.unet_stride = 2  # stride between two stages; 1 keeps a token for every latent position
    c.model.unet_kernel = 3  # kernel size; 1 (not the paper's): only the transformer mixes positions (docs/text.md)
    c.model.unet_context = (
        False  # True (not the paper's): a block's U-Net sees the finished positions left of it and above it
    )
    c.model.prediction_type = "eps"  # output for a noisy block: its noise, v or x0 (docs/training.md)
    c.model.rope = "axial"  # "axial": each axis rotates its own half of a head; "release": as the release mixes them
    c.model.time_embedding = "sinusoidal"  # or "raw" (release): the timestep itself as one number 0..999
    c.model.clean_timestep = "zero"  # timestep given to clean blocks; "noisy" (release): that of the noisy block
    c.model.hidden_from = "condition"  # input of the hidden term; "noisy" (release): condition + embedded noisy block
    c.model.clean_stream = True  # paper Table 3; False is the release's clear_clean
    c.model.ar_condition = True  # paper Table 3; False is the release's clear_cond
    c.model.param_sets = "separate"  # parameters of the clean and the noisy stream; or "shared" (paper Table 4)
    c.model.diffusion_attention = "sequence"  # or "block" (release: denoising_mlp; paper Table 5)
    c.model.classes = (
        0  # number of classes; an image has one label token, and guidance a further label; 0: unconditional
    )
    c.model.attention = "auto"  # implementation of skip-causal attention: auto, reference, blocks, cudnn, pallas
    c.model.dtype = "float32"  # type of the computation, or "bfloat16"; parameters are always float32
    c.model.remat = (
        "none"  # activations that the backward pass recomputes: none, dots, attention, full (docs/performance.md)
    )
    c.model.scan_unroll = 1  # layers per iteration of the scan over layers

    c.text = ConfigDict()  # captions instead of classes (docs/text.md)
    c.text.vocabulary = 0  # number of tokens of the tokenizer; 0: no captions
    c.text.tokenizer = ""  # tokenizer.json, a file of tiktoken, or "drawings" for that of the embedded drawings
    c.text.length = 1  # T, tokens of a caption with begin and end; 1 without captions
    c.text.caption = "caption"  # the caption of the source; or "class": the name of the image's class
    c.text.truncate = False  # cut longer captions and prompts; False: they are an error

    c.loss = ConfigDict()  # weights lambda of the four terms (paper Table 6)
    c.loss.image = 1.0
    c.loss.hidden = 0.1
    c.loss.clean = 0.0
    c.loss.text = 0.0
    c.loss.weighting = "output"  # weight of the image's error: 1; "v": as if the model predicted v; or "min_snr"

    c.diffusion = ConfigDict()  # the noise path (docs/training.md)
    c.diffusion.path = "ddpm"  # ddpm (release) | flow | cosine
    c.diffusion.time_sampling = "uniform"  # of training timesteps; or "logit_normal" (flow, cosine)
    c.diffusion.shift = 1.0  # flow, cosine: moves timesteps to more noise, for larger images; 1: no shift

    c.codec = ConfigDict()
    c.codec.name = "vae"  # image <-> latent: "vae" (AutoencoderKL) or "pixel" (space-to-depth, no learned part)
    c.codec.patch = 2  # pixel: side of the square of pixels that becomes one latent position
    c.codec.path = ""  # vae: a diffusers folder, a hub id or an Orbax folder made by --mode=convert
    c.codec.scaling_factor = SCALING_FACTOR  # vae: factor of its latents; a VAE with another factor is refused
    c.codec.dtype = "float32"  # type of the VAE's computation

    c.data = ConfigDict()
    c.data.source = "digits"  # digits | drawings | folder | tfds:<name> | webdataset | arrayrecord (docs/data.md)
    c.data.path = ""  # folder of images, tars or records; tfds: its data_dir
    c.data.drawings = 20_000  # number of drawings, over all splits
    # train | test (never seen in training) | all | composition (drawings); tfds and prepared records have their own
    c.data.split = "train"
    c.data.test_share = (
        0.05  # held-out share of folder, webdataset and drawings, by a hash of each name; digits hold out a fifth
    )
    c.data.image_size = 256
    c.data.channels = 3
    c.data.crop = True  # center crop to a square after resizing the shorter side; False: squeeze
    c.data.background = "white"  # color behind transparent pixels: a name, or "#rrggbb"
    c.data.max_corrupt = 0.05  # share of records that may be skipped (unreadable or without a label); more is an error
    c.data.max_pixels = 179_000_000  # largest image file; larger ones are skipped as unreadable
    c.data.flip = False  # random horizontal flip
    c.data.workers = 0  # worker processes that read and decode; 0: in the training process
    c.data.threads = 2  # batches read concurrently in each reading process; more helps with a slow bucket
    c.data.batches_ahead = 2  # finished batches that each reading process keeps

    c.prepare = ConfigDict()  # --mode=prepare, which writes to the workdir (docs/data.md)
    c.prepare.kind = "images"  # or "latents": the VAE's mean and log-variance
    c.prepare.shard = 1024  # source images in a shard, the most that are repeated after a kill
    c.prepare.batch = 16  # images encoded at once
    c.prepare.max_corrupt = 0.05  # share of undecodable images that may be skipped; more is an error
    c.prepare.flip = False  # also write a flipped copy of each image

    c.train = ConfigDict()
    c.train.batch = 64  # images per step, over all devices
    c.train.steps = 1000
    c.train.accumulate = 1  # microbatches whose gradients are averaged into one step
    c.train.ema_decay = 0.9999
    c.train.ema_warmup = True  # decay min(target, (1 + step) / (10 + step)); False (release): constant
    c.train.context_noise = 0  # largest timestep of the noise on clean blocks; 0: no noise
    c.train.label_dropout = 0.1  # share of labels or captions that are dropped, for guidance
    c.train.log_every = 50
    c.train.sample_every = 0  # steps between sample grids; 0: only at the end
    c.train.checkpoint_every = 1000
    c.train.evaluate_every = 0  # steps between scores of samples (docs/evaluation.md), and at the end; 0: never
    c.train.evaluate_n = 256  # images that are scored each time
    c.train.validate_every = 0  # steps between losses on `evaluate.split`, and at the end; 0: never
    c.train.validate_n = 256  # images in each of these losses, rounded up to whole batches
    c.train.judge = False  # at the end, run --mode=reference and --mode=evaluate, and score real images for comparison
    c.train.keep = 3  # number of newest checkpoints to keep
    c.train.keep_every = 0  # also keep for ever the averages of checkpoints at multiples of this step; 0: off
    c.train.init_from = ""  # workdir or export whose weights a new run starts from

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 3e-4
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.05
    c.optimizer.clip = 1.0  # global gradient norm; 0: off
    c.optimizer.skip = (
        0  # consecutive steps with a gradient that is not finite to skip before the run fails; 0: skip no step
    )
    c.optimizer.schedule = "wsd"  # wsd | cosine | constant
    c.optimizer.warmup = 0.01  # share of the steps, linear
    c.optimizer.decay = 0.15  # wsd: share of the steps at the end in which the rate falls to 2^-6 of its value

    c.sample = ConfigDict()
    c.sample.step = -1  # step of the checkpoint; -1: the newest
    c.sample.n = 64
    c.sample.batch = 64  # images drawn at once, over all devices
    c.sample.shard = 256  # images in a file, the most that are drawn again after a kill
    c.sample.grid = 64  # the first images, shown in the PNG of a sampling and of a training's step
    c.sample.film = ""  # "webp": write an animation of the denoising of the grid's images (--mode=sample)
    c.sample.solver = "dpmpp_2m"  # ddim | dpmpp_2m | euler | heun | ancestral (docs/sampling.md)
    c.sample.spacing = "trailing"  # trailing | leading | linspace (ddpm only)
    c.sample.steps = 50
    c.sample.guidance = 1.0  # classifier-free guidance scale; 1: off
    c.sample.guidance_schedule = "constant"  # or "linear": from 1 at the first solver step to the scale at the last
    c.sample.guidance_interval = (0, 999)  # lowest and highest timestep with guidance
    c.sample.prompts = ""  # captions: "a red planet; a blue one", a JSON list, a .txt file, or a split: "data:test"
    c.sample.labels = ""  # "": all classes; or names and numbers: "cat,7"; or a JSON list: '["2", 7]'
    c.sample.label_sampling = "balanced"  # labels in turn; or "random": drawn for each image from the seed
    c.sample.weights = "ema"  # ema | raw
    c.sample.noise = ""  # .npy file of the initial noise (n, L, positions, C) instead of the seed's
    c.sample.clip_x0 = 0.0  # bound on the absolute values of the predicted x0; 0: off (use 1 for pixels)

    c.evaluate = ConfigDict()  # --mode=reference and --mode=evaluate (docs/evaluation.md)
    c.evaluate.network = "classifier"  # network of the features: classifier | attributes | inception
    c.evaluate.network_path = (
        ""  # weights of the network; "": classifier.npz, attributes.npz or inception in the workdir
    )
    c.evaluate.reference = ""  # reference statistics; "": reference.npz in the workdir
    c.evaluate.split = "test"  # split of the reference statistics
    c.evaluate.n = 1000  # number of images to score
    c.evaluate.checkpoints = "newest"  # or "last:5", or steps: "1000,2000"
    c.evaluate.grid = ""  # settings of `sample`, every combination: "steps=5,20;guidance=1,2"
    c.evaluate.images = ""  # score these images instead: "data:<split>", a .npz, a folder of .npz files or of images
    c.evaluate.degrade = ""  # degrade these images first, to test the scores: "noise:16", "blur:1.5"
    c.evaluate.training = ""  # reference statistics of the training images, to find samples that copy them

    c.gallery = ConfigDict()  # --mode=gallery
    c.gallery.n = 8  # images
    c.gallery.grid = ""  # settings to compare, as in evaluate.grid; "": a fifth of the solver steps, and all

    c.demo = ConfigDict()  # --mode=demo
    c.demo.n = 4  # images of each model
    c.demo.other = ""  # workdir or export of a second model to compare with
    c.demo.host = "127.0.0.1"  # address to serve at; "0.0.0.0": all of this machine's
    c.demo.port = 7860  # 0: any free port

    c.convert = ConfigDict()  # --mode=convert; set one of the first four
    c.convert.release = ""  # checkpoint of the PyTorch release to convert to the workdir
    c.convert.vae = ""  # diffusers folder or hub id to convert to workdir/vae
    c.convert.inception = ""  # checkpoint of FID's Inception network to convert to workdir/inception
    c.convert.to_release = ""  # file to write from the workdir's newest checkpoint
    c.convert.weights = (
        ""  # "ema" or "model"; "": reads the EMA if the file has both, and writes the weights of sample.weights
    )

    c.compile = ConfigDict()  # --mode=compile (docs/scaling.md)
    c.compile.time = True  # also estimate the time of a step; memory alone takes a third of the time

    c.benchmark = ConfigDict()  # --mode=benchmark
    c.benchmark.parts = "train,sample,data"  # parts to measure
    c.benchmark.warmup = 1  # runs before the measured runs
    c.benchmark.steps = 5  # measured runs, of which the median is reported

    c.mesh = ConfigDict()  # devices along each axis; -1: the remaining devices
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.tensor = 1
    return c.lock()  # so that a config file cannot set a misspelled field


def differences(c: ConfigDict) -> dict[str, Any]:
    """Returns the fields that are not at their defaults, with their values: {"model.width": 96}."""
    defaults = fields.flat(base())
    return {name: value for name, value in fields.flat(c).items() if name not in defaults or value != defaults[name]}


def portable(c: ConfigDict) -> ConfigDict:
    """Returns a copy that is valid on any machine.

    Fields that are local to this machine have their defaults. The tokenizer's file is the one next to
    config.json.
    """
    copy, defaults = c.copy_and_resolve_references(), fields.flat(base())
    for name in identity.machine_specific_fields(fields.flat(c), defaults):
        copy.update_from_flattened_dict({name: TOKENIZER_FILE if name == "text.tokenizer" else defaults[name]})
    return copy


def variant(text: str, numbers: dict[str, int], words: tuple[str, ...] = ()) -> dict[str, int]:
    """Reads a config file's argument, as in `ffhq1024.py:D=7,tiny`.

    Args:
      text: The text after the colon; "" if the argument has none.
      numbers: Names that take a number, with their defaults.
      words: Names without a value.

    Returns:
      The value of each name. A name of `words` has the value 1 if `text` contains it, else 0.

    Raises:
      ConfigError: A name is unknown, or its value is not a number.
    """
    chosen = numbers | dict.fromkeys(words, 0)
    for part in text.split(",") if text else ():
        name, equals, value = part.partition("=")
        if name in numbers and value.isdecimal():
            chosen[name] = int(value)
        elif name in words and not equals:
            chosen[name] = 1
        else:
            known = ", ".join([*(f"{name}=<number>" for name in numbers), *words])
            raise ConfigError(f"--config: variant {part!r} is unknown: it is made of {known}, separated by commas.")
    return chosen


def as_tiny(c: ConfigDict) -> None:
    """Shrinks a config to a few steps of a small model on the embedded digits, with the same share of diffusion layers.

    Args:
      c: The config, which is changed.

    Raises:
      ConfigError: D is not from 1 to N.
    """
    validation.check_depth(c)
    share = c.model.diffusion_depth / c.model.depth
    c.model.depth = 4
    c.model.diffusion_depth = max(1, round(share * c.model.depth))
    c.model.width, c.model.heads, c.model.mlp_width = 64, 4, 128
    c.model.unet_channels, c.model.unet_layers, c.model.unet_time_width = (16, 32), 1, 32
    c.model.classes = min(c.model.classes, 10)
    if c.text.vocabulary:  # captions are the names of the digits
        c.text.tokenizer, c.text.vocabulary, c.text.length, c.text.caption = "drawings", 835, 4, "class"
        c.sample.prompts = "0;1;2;3;4;5;6;7;8;9"
    c.codec.name, c.codec.patch = "pixel", 2  # which needs no VAE
    c.data.source, c.data.image_size, c.data.channels = "digits", 32, 1
    c.train.steps, c.train.log_every, c.train.sample_every = 20, 5, 0
    c.train.batch = c.sample.n = c.sample.batch = 16
    c.sample.steps = 4
    c.evaluate.network, c.evaluate.n = "classifier", 16


def split_config_flag(value: str) -> tuple[str, str, str]:
    """Splits FILE:variant of --config into path, colon and variant. The path may contain colons."""
    ends = [i for i, character in enumerate(value) if character == ":"] + [len(value)]
    end = next((i for i in ends if os.path.isfile(value[:i])), ends[0])
    return value[:end], value[end : end + 1], value[end + 1 :]


def validate(c: ConfigDict) -> Sizes:
    """Checks a whole config and returns its sizes.

    Raises:
      ConfigError: Names the first wrong setting.
    """
    fields.check(c, base())
    validation.check(c)
    return derive_sizes(c)


def sample_labels(c: ConfigDict) -> list[int]:
    """Returns the class of each of the `sample.n` images; empty without classes.

    Images take the labels of `sample.labels` in turn. With `sample.label_sampling="random"` each image's label is drawn from
    them, all equally likely.

    Raises:
      ConfigError: A label is not a class number of the model.
    """
    chosen = class_labels.parse(c.sample.labels, c.model.classes)
    if chosen and c.sample.label_sampling == "random":
        return random.Random(c.seed).choices(chosen, k=c.sample.n)
    return [chosen[i % len(chosen)] for i in range(c.sample.n)] if chosen else []


def resolve_label_numbers(c: ConfigDict, names: Sequence[str]) -> None:
    """Replaces the labels in `sample.labels` by class numbers. A second call changes nothing.

    Args:
      c: The config, which is changed.
      names: Names of all classes in order; empty if the data name none.

    Raises:
      ConfigError: A label is not a class, or it is ambiguous.
    """
    if c.sample.labels:
        chosen = class_labels.parse(c.sample.labels, c.model.classes, names)
        c.sample.labels = class_labels.from_numbers(chosen)
