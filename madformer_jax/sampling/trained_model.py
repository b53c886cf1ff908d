"""The Python interface to a trained model: `madformer_jax.load`, `Model` and `Frame`.

`modes.demo`, `modes.gallery` and the film of `modes.sample` draw through `Model` too. Arguments of
`Model.sample` are the fields of `config.sample`; add a conversion to `_ARGUMENT_CONVERTERS` if the
Python value of a field differs from its text. Over 400 lines, since the docstrings
are the reference of docs/api.md.
"""

import difflib
import functools
import operator
import os
import reprlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from madformer_jax.config import aliases, block_steps, class_labels, fields, seeds, validation
from madformer_jax.config import schema as config_lib
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.cost import flops
from madformer_jax.diffusion import sampler, solvers
from madformer_jax.diffusion import schedule as schedules
from madformer_jax.diffusion.autoguidance import GuidedPair
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.models import block_order
from madformer_jax.models.madformer import MADFormer
from madformer_jax.runtime import checkpoint, memory, numerics, partitioning, storage, stored_config
from madformer_jax.sampling import codec, editing, generation, prompts, solving
from madformer_jax.sampling.opening import TrainedModel


class Frame(NamedTuple):
    """Partly drawn images.

    Attributes:
      images: uint8 (n, H, W, c): the finished blocks, an estimate of the current one, and gray for the
        others. For codec `external`, previews (see `Model.sample`).
      block: Index of the current block in the order of generation, from 0. An edit starts at the first
        block that it draws.
      step: Solver steps done in the current block, from 1.
      passes: Passes of an image so far. They count every layer that runs, and those of a guide.
      seconds: Seconds since the first frame was requested.
    """

    images: np.ndarray
    block: int
    step: int
    passes: float
    seconds: float


class SamplingCost(NamedTuple):
    """The cost of drawing an image, in both guidance branches.

    Attributes:
      passes: Runs of all layers on the whole image. They count every layer that runs, and those of a guide.
      flops: Floating-point operations, with those of the codec.
      nfe: The paper's count (section 1), without the clean tower.
    """

    passes: float
    flops: float
    nfe: float


class Model:
    """A trained model, as `load` returns it.

    The first call with a number of images, a solver, a `clip_x0` or guidance on or off compiles a program,
    which can take a minute. Both also compile for a new `diffusion_depth` or `context_noise`. `sample` also
    compiles for new steps, `spacing` or `block_order`, for the first noise file, and for another number of
    kept blocks. Seeds, labels, prompts and guidance scales compile nothing.

    Attributes:
      config: The config of the training, with the settings of `load`. Its section `sample` has the defaults
        of the settings below.
      params: The parameters, as a tree of arrays.
      labels: The class names, in the order of their numbers; empty if the data have none.
    """

    @numerics.scoped
    def __init__(self, config: ConfigDict, trained: TrainedModel, codec_params: Any = None):
        self.config = config
        self.params = trained.params
        self.labels = tuple(trained.class_names)
        self._mesh, self._codec, self._trained = trained.mesh, trained.codec, trained
        self._guide_config = stored_config.guide_config(config) if trained.guide else None
        self._codec_params = trained.load_codec_params() if codec_params is None else codec_params
        self._programs: dict[Any, Any] = {}
        self._warnings: set[str] = set()

    def __repr__(self) -> str:
        c, m = self.config, self.config.model
        condition = "captions" if c.text.vocabulary else "unconditional"
        if m.classes:
            names = f": {class_labels.summary(range(m.classes), self.labels)}" if self.labels else ""
            condition = f"{m.classes} classes{names}"
        size, parameters = c.data.image_size, sum(x.size for x in jax.tree.leaves(self.params))
        return (
            f"<madformer_jax.Model: {size} x {size} x {c.data.channels} images; {condition}; {m.depth} layers, "
            f"{m.diffusion_depth} of them diffusion layers; {m.blocks} blocks; {parameters:,} parameters>"
        )

    @numerics.scoped
    def sample(self, n: int | None = None, image: Any = None, mask: Any = None, **settings: Any) -> np.ndarray:
        """Draws the images that --mode=sample draws with the same settings.

        Args:
          n: Number of images. By default one for each label, prompt or picture, or one.
          image: A picture to edit: a file, or uint8 pixels (H, W, c). Pixels (m, H, W, c) are m pictures,
            which the images take in turn.
          mask: The pixels of the picture to keep: an array (H, W) that is true or white there, a file that is
            white there, or numbers of blocks. Blocks that are not kept as a whole are drawn (docs/sampling.md).
          settings: The settings below. The default of each is that of `config`.

            - seed: A whole number. The same seed and settings give the same images.
            - labels: Class numbers (integers) or class names (texts), which the images take in turn.
            - label_sampling: "balanced", or "random": labels are drawn for each image from the seed.
            - prompts: Texts, which the images take in turn. None of them names a file or a split.
            - solver: A name of `config.choices.SOLVERS`, such as "dpmpp_2m" (docs/sampling.md).
            - steps: Solver steps of a block.
            - steps_by_block: "constant", or steps of each block, as in "16,8,8,4" or "linear:1.5x:0.5x".
            - diffusion_depth: D, if the model was trained with several (`train.elastic_depth`); 0 is its own.
            - context_noise: Timestep of the noise on finished blocks that later blocks read; 0 is off.
            - spacing: "trailing", or on the path `ddpm` also "leading" or "linspace".
            - guidance: Guidance scale; 1 is off. If `load` was given a guide, the guide takes the place of
              the null label.
            - guidance_schedule: "constant" or "linear".
            - guidance_interval: The lowest and the highest timestep with guidance.
            - clip_x0: Bound on the absolute values of the predicted x0; 0 is off.
            - block_order: The order in which a model of random order draws the blocks.
            - noise: A .npy file of the initial noise (n, L, positions, C), in place of the seed's.
            - batch: Images drawn at once, which bounds the memory.

        Returns:
          uint8 (n, H, W, c). For codec `external`, previews: the first channels of the latents as colors.
            `sample_latents` returns these latents.

        Raises:
          ConfigError: A setting is wrong, or a value is not finite.
        """
        return self._draw(*self._edit_settings(n, image, mask, settings), "images")

    @numerics.scoped
    def sample_latents(self, n: int | None = None, **settings: Any) -> np.ndarray:
        """Draws the latents of the images of `sample`, for a decoder of your own (docs/data.md).

        Args:
          n: See `sample`.
          settings: See `sample`.

        Returns:
          float32 (n, h, w, C), in the scale of the files that the model was trained on.

        Raises:
          ConfigError: The codec is not `external`, a setting is wrong, or a value is not finite.
        """
        c = self._settings(n, settings)
        if c.codec.name != "external":
            raise ConfigError(
                f"config.codec.name={c.codec.name!r} decodes latents itself: use `sample`, not `sample_latents`."
            )
        latents: np.ndarray = codec.external_scale(c).invert(self._draw(c, None, "latents"))
        return latents

    def _draw(self, c: ConfigDict, edit: editing.Edit | None, field: str) -> np.ndarray:
        """Draws the images of a config or an edit and returns a field of `generation.SampleBatch`."""
        s = c.sample
        network, params = self._trained.sampled(c)
        static = (
            s.solver, s.spacing, solving.solver_steps(c), s.diffusion_depth, s.context_noise, s.clip_x0, s.guidance == 1.0,
        )  # fmt: skip
        sample_fn = self._program(
            ("draw", *static, s.block_order),
            lambda: generation.make_sample_fn(c, network, self._codec.decode),
        )
        with partitioning.scope(self._mesh):
            conditions = generation.read_conditions(c)._replace(kept_blocks=self._encode(edit))
            batches = generation.batches(
                c, sample_fn, params, self._codec_params, self._mesh, range(s.n), max_batch=s.n, conditions=conditions
            )
            return np.concatenate([getattr(batch, field) for batch in batches])

    def _encode(self, edit: editing.Edit | None) -> editing.KeptBlocks | None:
        """Encodes the kept blocks of an edit."""
        if edit is None:
            return None
        return editing.encode(edit, self._codec, self._codec_params, derive_sizes(self.config))

    def stream(
        self, n: int | None = None, every: str = "block", image: Any = None, mask: Any = None, **settings: Any
    ) -> Iterator[Frame]:
        """Yields images while they are drawn. The last frame has the images of `sample`.

        Args:
          n: See `sample`.
          image: See `sample`.
          mask: See `sample`.
          every: "block" yields a frame after each finished block, "step" after each solver step.
          settings: See `sample`. `batch` has no effect, since all images are drawn at once.

        Raises:
          ConfigError: A setting is wrong, or a value is not finite.
        """
        if every not in ("block", "step"):
            raise ConfigError(f"every={every!r} must be 'block' or 'step'.")
        c, edit = self._edit_settings(n, image, mask, settings, ("every",))
        return self.stream_config(c, every, edit)

    def cost(
        self,
        steps: int | None = None,
        guidance: float | None = None,
        steps_by_block: str | None = None,
        diffusion_depth: int | None = None,
        kept_count: int = 0,
    ) -> SamplingCost:
        """Returns the cost of an image with the solver of `config`.

        Args:
          steps: Solver steps of a block; by default those of `config`.
          guidance: Guidance scale; by default that of `config`. All scales but 1 cost the same.
          steps_by_block: Steps of each block; by default those of `config`.
          diffusion_depth: D; by default that of `config`.
          kept_count: Number of blocks that an edit keeps.

        Raises:
          ConfigError: A setting is wrong.
        """
        settings = {
            "steps": steps, "guidance": guidance, "steps_by_block": steps_by_block, "diffusion_depth": diffusion_depth,
        }  # fmt: skip
        c = self._settings(1, {name: value for name, value in settings.items() if value is not None})
        cost = flops.image_cost(c, self._guide_settings(c), kept_count)
        return SamplingCost(cost["passes"], cost["flops"], cost["nfe"])

    def _settings(self, n: int | None, settings: Mapping[str, Any], others: Sequence[str] = ()) -> ConfigDict:
        """Returns the config with the settings of a call.

        Args:
          n: Number of images, or None.
          settings: The settings by name.
          others: Names of the call's other arguments, which an error may suggest.

        Raises:
          ConfigError: A setting is unknown or wrong, or there are more labels or prompts than
            images.
        """
        c = self.config.copy_and_resolve_references()
        for name, value in aliases.current_names(settings, "a setting of sampling", "sample.").items():
            if name in _LOAD_FIELDS:
                raise ConfigError(
                    f"{name}={value!r}: the weights of a model are chosen when it is loaded: load(path, {name}={value!r})."
                )
            if name == "seed":
                c.seed, c.seeds.sample = _to_field_type(name, value, c.seed), -1
            elif name in c.sample and name not in _FILE_FIELDS:
                c.sample[name] = (
                    _ARGUMENT_CONVERTERS[name](value)
                    if name in _ARGUMENT_CONVERTERS
                    else _to_field_type(name, value, c.sample[name])
                )
            else:
                known = [x for x in ("seed", *others, *c.sample) if x not in _LOAD_FIELDS + _FILE_FIELDS]
                raise ConfigError(_unknown_setting_message(name, value, "sampling", known))
        c.sample.noise = storage.expand(c.sample.noise)
        c.sample.n = 1 if n is None else _to_field_type("n", n, 1)
        config_lib.validate(c)
        config_lib.resolve_label_numbers(c, self.labels)
        self._warn(c)
        for name in [name for name in _ARGUMENT_CONVERTERS if name in settings and c.sample[name]]:
            count = len(fields.json_list(c.sample[name]) or ())
            if n is None:
                c.sample.n = max(1, count)
            elif count > c.sample.n and (name, c.sample.label_sampling) != ("labels", "random"):
                raise ConfigError(
                    f"{name}: there are {count} of them for n={n} images. Give at most {n}, or leave n out."
                )
        return c

    def _edit_settings(
        self, n: int | None, image: Any, mask: Any, settings: Mapping[str, Any], others: Sequence[str] = ()
    ) -> tuple[ConfigDict, editing.Edit | None]:
        """Returns the config with the settings of a call, and its edit.

        Raises:
          ConfigError: See `_settings` and `editing.read_edit`. Or there are more pictures than images.
        """
        c = self._settings(n, settings, ("image", "mask", *others))
        edit = editing.read_edit(c, image, mask)
        count = 0 if edit is None else len(edit.pictures)
        if n is None:
            c.sample.n = max(c.sample.n, count)
        elif count > c.sample.n:
            raise ConfigError(f"image: there are {count} of them for n={n} images. Give at most {n}, or leave n out.")
        return c, edit

    def _warn(self, c: ConfigDict) -> None:
        """Logs each probable mistake in the settings once."""
        for line in validation.sampling_warnings(c):
            if line not in self._warnings:
                self._warnings.add(line)
                logging.warning("%s", line)

    def _program(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns the cached value of a key, or makes it."""
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    def stream_config(self, c: ConfigDict, every: str, edit: editing.Edit | None = None) -> Iterator[Frame]:
        """Yields the frames of `stream` for a whole validated config and its edit."""
        frames = self._frames(c, every, edit)
        # The numerics apply while a frame is computed, not in the caller's code between frames.
        next_frame = numerics.scoped(lambda: next(frames, None))
        while (frame := next_frame()) is not None:
            yield frame

    def stream_is_compiled(self, n: int | None = None, **settings: Any) -> bool:
        """Returns whether `stream` has run with these settings, up to those that compile nothing.

        Raises:
          ConfigError: A setting is wrong.
        """
        c = self._settings(n, settings)
        return ("blocks", c.sample.n, c.sample.diffusion_depth, *self._static_settings(c, 0)) in self._programs

    def _static_settings(self, c: ConfigDict, block: int) -> tuple[Any, ...]:
        """Returns the settings that are compiled into the programs of `stream` for a block."""
        network, _ = self._trained.sampled(c)
        guided = isinstance(network, GuidedPair) or flops.guidance_branches(c) == 2
        return (
            c.sample.solver,
            guided,
            c.sample.clip_x0,
            sampler.clean_timestep(network, solving.coefficients(c, block), c.sample.context_noise),
            sampler.context_level(schedules.make(**c.diffusion), c.sample.context_noise),
        )

    def _frames(self, c: ConfigDict, every: str, edit: editing.Edit | None) -> Iterator[Frame]:
        """Draws block by block and yields frames; `stream_config` sets the numerics."""
        s, m, sizes, began = c.sample, c.model, derive_sizes(c), time.monotonic()
        solver, steps_of_blocks = solvers.make(s.solver), block_steps.steps_of_blocks(c)
        network, params = self._trained.sampled(c)

        def programs(block: int) -> Any:
            static = self._static_settings(c, block)
            key = ("blocks", s.n, s.diffusion_depth, *static)
            return self._program(key, lambda: self._block_programs(network, params, *static))

        costs = [x for x in (c, self._guide_settings(c)) if x is not None]
        keys = generation.image_keys(np.uint32(seeds.of(c, "sample")), jnp.arange(s.n, dtype=jnp.int32))
        file_noise = generation.open_noise(c)
        if file_noise is None:
            noise = generation.keyed_noise(keys, sizes.block_shape)
        else:
            noise = jnp.asarray(file_noise, jnp.float32)
        classes = np.array(config_lib.sample_labels(c), np.int32)[:, None] if m.classes else None
        if (kept_blocks := self._encode(edit)) is not None:
            kept_blocks = kept_blocks._replace(blocks=kept_blocks.of_images(np.arange(s.n)))
        order, block_array = editing.sampler_arguments(c, keys, kept_blocks).values()
        noise = block_order.to_generation_order(noise, order)
        begin, *_, cache_clean, _ = programs(0)
        z, (cache, pred) = jnp.zeros_like(noise), begin(noise, *(prompts.tokenize(c) or (classes, None)), order)
        first = 0 if block_array is None else block_array.shape[1]
        for block in range(first):
            z = z.at[:, block].set(block_array[:, block])
            cache, pred = cache_clean(cache, block_array[:, block : block + 1], None, block, keys)
        for block, steps in list(enumerate(steps_of_blocks))[first:]:
            _, condition, step, cache_clean, decode = programs(block)
            coefficients = solvers.evaluation_rows(solving.coefficients(c, block))
            rows = list(zip(coefficients, solving.block_guidance_scales(c, block)))
            c_i, cache = condition(cache, pred, block)
            state = solver.init(noise[:, block : block + 1])
            for i, row in enumerate(rows, 1):
                state, own_kv = step(cache, c_i, state, *row, block, keys)
                k, rest = divmod(i, solver.evaluations_per_step)
                k = steps if i == len(rows) else k
                if k == steps or (every == "step" and not rest):
                    current = state.x if k == steps else state.x0
                    images, finite = jax.device_get(decode(z.at[:, block].set(current[:, 0]), order))
                    if not finite:
                        raise ConfigError(
                            f"sampling gave values that are not finite in block {block + 1}: the weights may have diverged, or "
                            f"guidance={s.guidance} with clip_x0={s.clip_x0} is too strong."
                        )
                    passes = sum(flops.model_passes_until(x, block, k, first) for x in costs)
                    yield Frame(images, block, k, passes, time.monotonic() - began)
            z = z.at[:, block].set(state.x[:, 0])
            if block + 1 < sizes.blocks:
                cache, pred = cache_clean(cache, state.x, own_kv, block, keys)

    def _guide_settings(self, c: ConfigDict) -> ConfigDict | None:
        """Returns the guide's config with the solver of `c`; None if no guide draws with `c`."""
        if self._guide_config is None or c.sample.guidance == 1.0:
            return None
        guide = self._guide_config.copy_and_resolve_references()
        for name in ("solver", "spacing", "steps", "steps_by_block"):
            guide.sample[name] = c.sample[name]
        return guide

    def _block_programs(
        self, network: MADFormer | GuidedPair, params: Any, solver: str, *static: Any
    ) -> tuple[Any, ...]:
        """Returns the programs that draw a block, and one that decodes blocks to uint8 images.

        Each is compiled once for all blocks and steps.

        Args:
          network: The model, or the model and its guide.
          params: The parameters.
          solver: Name of the solver.
          static: The fields of `sampler.BlockSteps` after the solver.
        """
        sizes = derive_sizes(self.config)
        params = self._program(
            ("inference params", type(network), network.config.diffusion_depth),
            lambda: self._jitted(
                functools.partial(generation.sampling_params, network, memory=memory.device_capacity()), params
            )(),
        )

        def block_program(name: str) -> Any:
            def run(params: Any, *args: Any) -> Any:
                return getattr(sampler.BlockSteps(network, params, solvers.make(solver), *static), name)(*args)

            return self._jitted(run, params)

        def decode(codec_params: Any, z: Any, order: Any) -> Any:
            pixels = self._codec.decode(codec_params, codec.from_blocks(block_order.to_raster_order(z, order), sizes))
            return generation.to_uint8(pixels), jnp.isfinite(pixels).all()

        methods = ("begin", "condition", "step", "cache_clean")
        return (*map(block_program, methods), self._jitted(decode, self._codec_params))

    def _jitted(self, function: Any, params: Any) -> Any:
        """Compiles a function whose first argument is `params`."""
        program = jax.jit(function)

        def run(*args: Any) -> Any:
            with partitioning.scope(self._mesh):
                return program(params, *args)

        return run


_LOAD_FIELDS = ("step", "weights", "ema", "guide", "guide_step")  # choose the weights of a model
_FILE_FIELDS = ("shard", "grid", "film", "image", "keep")  # concern files that --mode=sample reads or writes

# Convert the Python value of a setting to the text in its field.
_ARGUMENT_CONVERTERS: dict[str, Callable[[Any], str]] = {
    "labels": class_labels.from_python,
    "prompts": prompts.from_python,
}


def _to_field_type(name: str, value: Any, reference: Any) -> Any:
    """Converts a value of a Python caller to the type of its field.

    Numbers of NumPy and JAX, and texts of numbers, are accepted as numbers.

    Raises:
      ConfigError: The value has another type than `reference`.
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        if isinstance(reference, tuple):
            return tuple(_to_field_type(name, item, reference[0]) for item in value)
        if isinstance(reference, str):
            value = os.fspath(value)
            if not isinstance(value, str):
                raise TypeError
            return value
        if isinstance(reference, float):
            return float(value)
        whole = isinstance(value, float | np.floating) and float(value).is_integer()
        return int(value) if whole or isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError, OverflowError):
        kind = {int: "a whole number", float: "a number", str: "a text", tuple: "whole numbers"}[type(reference)]
        raise ConfigError(f"{name}={reprlib.repr(value)} must be {kind}.") from None


def _unknown_setting_message(name: str, value: Any, purpose: str, known: Sequence[str]) -> str:
    similar = difflib.get_close_matches(name, known, 1)
    hint = f"Did you mean {similar[0]!r}?" if similar else f"The settings are {', '.join(known)}."
    return f"{name}={reprlib.repr(value)}: {name!r} is not a setting of {purpose}. {hint}"


@numerics.scoped
def load(path: str, codec: str = "", **settings: Any) -> Model:
    """Loads a trained model to draw with. `madformer_jax.load` has the arguments and errors."""
    path = storage.expand(path)
    if not os.path.exists(path) and not storage.is_remote(path) and path.count("/") == 1:
        path = _download_from_hub(path)
    file = f"{path.rstrip('/')}/config.json"
    saved = storage.read_json(file)
    if saved is None:
        raise ConfigError(f"{file} does not exist: give the workdir of a training, an export or a converted release.")
    c = stored_config.config_from_saved(saved, file)
    if codec:
        c.codec.path = codec
    for name, value in settings.items():
        if name not in _LOAD_FIELDS:
            raise ConfigError(_unknown_setting_message(name, value, "loading", ("path", "codec", *_LOAD_FIELDS)))
        if name in ("step", "weights", "ema") and not checkpoint.exists(path):
            raise ConfigError(
                f"{name}={value!r}: {path} is an export, which holds one set of weights. Leave {name} out."
            )
        c.sample[name] = _to_field_type(name, value, c.sample[name])
    stored_config.expand_paths(c)
    config_lib.validate(c)
    return load_workdir(c, path)


@numerics.scoped
def load_workdir(c: ConfigDict, path: str) -> Model:
    """Loads the model of a folder by a validated config.

    Its step, mesh and codec may differ from those of the folder's config.

    Raises:
      ConfigError: The folder has no model, or it is damaged.
    """
    return Model(c, TrainedModel.open(c, path))


def _download_from_hub(name: str) -> str:
    """Downloads a repository of the hub and returns its folder."""
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(
            f"the folder {name} does not exist; to download it from the Hugging Face hub: pip install huggingface_hub."
        ) from None
    try:
        return str(huggingface_hub.snapshot_download(name))
    except Exception as error:  # The network, the hub and the disk each raise errors of their own.
        raise ConfigError(
            f"the folder {name} does not exist, and the Hugging Face hub says: {first_line(error)}."
        ) from None
