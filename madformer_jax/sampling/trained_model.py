"""A trained model as a Python object: `madformer_jax.load`."""

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

from madformer_jax.config import aliases, class_labels, fields, validation
from madformer_jax.config import schema as config_lib
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.cost import flops
from madformer_jax.data import text
from madformer_jax.diffusion import sampler, solvers
from madformer_jax.errors import ConfigError, first_line
from madformer_jax.models import madformer
from madformer_jax.models.inference_params import inference_params
from madformer_jax.runtime import checkpoint, memory, numerics, partitioning, storage, stored_config
from madformer_jax.sampling import codec, generation, prompts
from madformer_jax.weights import state_dicts


class Frame(NamedTuple):
    """Pictures as they come into being."""

    images: np.ndarray  # uint8 (n, H, W, c): finished blocks, the clean estimate of the one that is drawn, grey
    block: int  # that is drawn, from 0
    step: int  # solver steps that it has had
    passes: float  # full-model passes of an image so far (`flops.model_passes`)
    seconds: float  # since the first was asked for


class SamplingCost(NamedTuple):
    """What an image costs."""

    passes: float  # of the full model: every layer that runs, the clean tower's among them, in every guidance branch
    flops: float
    nfe: float  # the paper's count, without the clean tower; in every guidance branch


class Model:
    """A trained model; `load` makes one. Programs are compiled once for each shape and each setting that is no number of theirs."""

    @numerics.scoped
    def __init__(self, config: ConfigDict, params: Any, labels: Sequence[str] = (), codec_params: Any = None):
        self.config = config  # as it was trained, with what `sample` and `stream` take by default
        self.params = params
        self.labels = tuple(labels)  # names of the classes, where the data have some
        self._mesh = partitioning.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        self._model, self._codec = madformer.build(config), codec.build(config)
        if codec_params is None:
            codec_params = jax.device_put(self._codec.load(), partitioning.replicated(self._mesh))
        self._codec_params = codec_params
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
    def sample(self, n: int | None = None, **settings: Any) -> np.ndarray:
        """Draws images: those of --mode=sample with the same settings, number for number.

        Args:
          n: Number of images; by default as many as there are labels or prompts, or one.
          settings: `labels`, class numbers (integers) or class names (texts), or `prompts`, texts that are drawn as they are;
            images take them in turn. And `seed`, and the fields of `config.sample`: guidance, steps, solver, spacing, clip_x0.

        Returns:
          uint8 (n, H, W, c).

        Raises:
          ConfigError: A setting is wrong, or a value is not finite.
        """
        c = self._settings(n, settings)
        s = c.sample
        draw = self._program(
            ("draw", s.solver, s.spacing, s.steps, s.clip_x0, s.guidance == 1.0),
            lambda: generation.make_sample_fn(c, self._model, self._codec.decode),
        )
        with partitioning.scope(self._mesh):
            batches = generation.batches(c, draw, self.params, self._codec_params, self._mesh, range(s.n), most=s.n)
            return np.concatenate([batch.images for batch in batches])

    def stream(self, n: int | None = None, every: str = "block", **settings: Any) -> Iterator[Frame]:
        """Draws images and shows them on the way; the last frame has those of `sample`.

        Args:
          n, settings: as `sample` takes them.
          every: a frame after each finished "block", or after each solver "step".

        Raises:
          ConfigError: a setting is wrong, or a value is not finite.
        """
        if every not in ("block", "step"):
            raise ConfigError(f"every={every!r} must be 'block' or 'step'.")
        return self.frames(self._settings(n, settings), every)

    def cost(self, steps: int | None = None, guidance: float | None = None) -> SamplingCost:
        """What an image costs in so many solver steps; by default those of the config."""
        given = {"steps": steps, "guidance": guidance}
        c = self._settings(1, {name: value for name, value in given.items() if value is not None})
        cost = flops.image_cost(c)
        return SamplingCost(cost["passes"], cost["flops"], cost["nfe"])

    def _settings(self, n: int | None, given: Mapping[str, Any]) -> ConfigDict:
        """Returns the config with the settings of a call.

        Raises:
          ConfigError: A setting is unknown or wrong, or there are more labels or prompts than images.
        """
        c = self.config.copy_and_resolve_references()
        for name, value in aliases.current_names(given, "a setting of sampling", "sample.").items():
            if name in _FIXED_FIELDS:
                raise ConfigError(f"{name}={value!r}: the weights of a model were chosen when it was loaded.")
            if name == "seed":
                c.seed = _to_field_type(name, value, c.seed)
            elif name in c.sample:
                c.sample[name] = (
                    _ARGUMENT_CONVERTERS[name](value)
                    if name in _ARGUMENT_CONVERTERS
                    else _to_field_type(name, value, c.sample[name])
                )
            else:
                raise ConfigError(
                    _unknown_setting_message(name, value, [x for x in ("seed", *c.sample) if x not in _FIXED_FIELDS])
                )
        c.sample.n = 1 if n is None else _to_field_type("n", n, 1)
        config_lib.validate(c)
        config_lib.resolve_label_numbers(c, self.labels)
        self._warn(c)
        for name in [name for name in _ARGUMENT_CONVERTERS if name in given and c.sample[name]]:
            count = len(fields.json_list(c.sample[name]) or ())
            if n is None:
                c.sample.n = max(1, count)
            elif count > c.sample.n and (name, c.sample.label_sampling) != ("labels", "random"):
                raise ConfigError(
                    f"{name}: there are {count} of them for n={n} images. Give at most {n}, or leave n out."
                )
        return c

    def _warn(self, c: ConfigDict) -> None:
        """Logs what is probably a mistake in the settings, once for a model."""
        for line in validation.sampling_warnings(c):
            if line not in self._warnings:
                self._warnings.add(line)
                logging.warning("%s", line)

    def _program(self, key: Any, make: Any) -> Any:
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    def frames(self, c: ConfigDict, every: str) -> Iterator[Frame]:
        """As `stream`, of a whole validated config."""
        frames = self._frames(c, every)
        following = numerics.scoped(
            lambda: next(frames, None)
        )  # the caller's code between two frames keeps its settings
        while (frame := following()) is not None:
            yield frame

    def _frames(self, c: ConfigDict, every: str) -> Iterator[Frame]:
        s, m, sizes, began = c.sample, c.model, derive_sizes(c), time.monotonic()
        coefficients = solvers.coefficients(s.solver, s.spacing, s.steps)
        what = flops.guidance_branches(c) == 2, s.clip_x0, sampler.clean_timestep(self._model, coefficients)
        begin, condition, step, extend, show = self._program(("parts", *what), lambda: self._parts(*what))
        rows = list(zip(solvers.step_rows(coefficients), generation.guidance_scales(c)))
        given = generation.open_noise(c)
        if given is None:
            noise = generation.seeded_noise(np.uint32(c.seed), jnp.arange(s.n, dtype=jnp.int32), sizes.block_shape)
        else:
            noise = jnp.asarray(given, jnp.float32)
        classes = np.array(config_lib.sample_labels(c), np.int32)[:, None] if m.classes else None
        z, (cache, pred) = jnp.zeros_like(noise), begin(noise, *(prompts.tokenize(c) or (classes, None)))
        for block in range(sizes.blocks):
            c_i, cache = condition(cache, pred, block)
            state = solvers.initial_state(noise[:, block : block + 1])
            for k, row in enumerate(rows, 1):
                state, own = step(cache, c_i, state, *row, block)
                if k == s.steps or every == "step":
                    shown = state.x if k == s.steps else state.x0
                    images, finite = jax.device_get(show(z.at[:, block].set(shown[:, 0])))
                    if not finite:
                        raise ConfigError(
                            f"sampling gave values that are not finite in block {block + 1}: the weights may have diverged, or "
                            f"guidance={s.guidance} with clip_x0={s.clip_x0} is too strong."
                        )
                    yield Frame(images, block, k, flops.model_passes_until(c, block, k), time.monotonic() - began)
            z = z.at[:, block].set(state.x[:, 0])
            if block + 1 < sizes.blocks:
                cache, pred = extend(cache, state.x, own, block)

    def _parts(self, *what: Any) -> tuple[Any, ...]:
        """What a block goes through, each compiled once for all blocks and steps, and what shows latent blocks.

        Args:
          what: the fields of `sampler.BlockSteps` behind model and parameters.
        """
        sizes = derive_sizes(self.config)
        held = self._program("resident", self._resident)

        def part(name: str) -> Any:
            def run(params: Any, *args: Any) -> Any:
                return getattr(sampler.BlockSteps(self._model, params, *what), name)(*args)

            return self._jitted(run, held)

        def show(codec_params: Any, z: Any) -> Any:
            pixels = self._codec.decode(codec_params, codec.from_blocks(z, sizes))
            return generation.to_uint8(pixels), jnp.isfinite(pixels).all()

        return (*map(part, ("begin", "condition", "step", "extend")), self._jitted(show, self._codec_params))

    def _resident(self) -> Any:
        """The parameters as `drawing.make_draw` has them, made once and not in each part."""
        with partitioning.scope(self._mesh):
            return jax.jit(functools.partial(inference_params, self._model, memory=memory.device_capacity()))(
                self.params
            )

    def _jitted(self, function: Any, params: Any) -> Any:
        program = jax.jit(function)

        def run(*args: Any) -> Any:
            with partitioning.scope(self._mesh):
                return program(params, *args)

        return run


_FIXED_FIELDS = ("weights", "step")

# Settings whose Python values are not those of their fields.
_ARGUMENT_CONVERTERS: dict[str, Callable[[Any], str]] = {
    "labels": class_labels.from_python,
    "prompts": prompts.from_python,
}


def _to_field_type(name: str, value: Any, like: Any) -> Any:
    """Returns a value of a Python caller as the type of its field. Numbers of NumPy and JAX, and texts of numbers, are numbers.

    Raises:
      ConfigError: The value is of another type.
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        if isinstance(like, tuple):
            return tuple(_to_field_type(name, part, like[0]) for part in value)
        if isinstance(like, str):
            value = os.fspath(value)
            if not isinstance(value, str):
                raise TypeError
            return value
        if isinstance(like, float):
            return float(value)
        whole = isinstance(value, float | np.floating) and float(value).is_integer()
        return int(value) if whole or isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError, OverflowError):
        kind = {int: "a whole number", float: "a number", str: "a text", tuple: "whole numbers"}[type(like)]
        raise ConfigError(f"{name}={reprlib.repr(value)} must be {kind}.") from None


def _unknown_setting_message(name: str, value: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"Did you mean {near[0]!r}?" if near else f"The settings are {', '.join(known)}."
    return f"{name}={reprlib.repr(value)}: there is no such setting of sampling. {hint}"


@numerics.scoped
def load(path: str, codec: str = "") -> Model:
    """Loads a model of a workdir of --mode=train or --mode=convert, of its export, or of a repository of the Hugging Face hub.

    The mesh and the paths of a config.json that this user has not written are ignored (docs/weights.md).

    Args:
      path: The folder, gs:// ones among them; or "owner/name", which needs huggingface_hub and a network.
      codec: Folder or hub id of the VAE, for a config that names none or another one.

    Raises:
      ConfigError: There is no model, or it is damaged.
    """
    path = storage.expand(path)
    if not os.path.exists(path) and not storage.is_remote(path) and path.count("/") == 1:
        path = _download_from_hub(path)
    file = f"{path.rstrip('/')}/config.json"
    saved = storage.read_json(file)
    if saved is None:
        raise ConfigError(f"there is no {file}: give the workdir of a training, an export or a converted release.")
    c = stored_config.config_from_saved(saved, file)
    if codec:
        c.codec.path = codec
    stored_config.expand_paths(c)
    config_lib.validate(c)
    return load_workdir(c, path)


@numerics.scoped
def load_workdir(c: ConfigDict, path: str) -> Model:
    """The model in a folder, by a validated config, which may name another step, mesh or codec than the folder's own.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    target = generation.abstract_params(madformer.build(c), mesh)
    if not checkpoint.exists(path) and os.path.exists(tensors := os.path.join(path, "model.safetensors")):
        return _load_safetensors(c, tensors, target)
    checkpoint.require(path)
    with partitioning.scope(mesh), checkpoint.Checkpoints(path, read_only=True) as checkpoints:
        step, params = checkpoints.restore_weights(c.sample.weights, target, c.sample.step)
        names = checkpoints.class_names(step)
        text.check_tokenizer_identity(c, checkpoints.meta(step), step, path)
    return Model(c, params, names)


def _load_safetensors(c: ConfigDict, path: str, target: Any) -> Model:
    """The model of an export's model.safetensors."""
    tensors, about, _ = state_dicts.read_state_dict(path)
    tree = state_dicts.unflatten(tensors, target, path)
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), tree, target)
    return Model(c, params, (about or {}).get("names", ()))


def _download_from_hub(name: str) -> str:
    """The folder that a repository of the hub is downloaded to."""
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(
            f"there is no folder {name}; to take it from the Hugging Face hub: pip install huggingface_hub."
        ) from None
    try:
        return str(huggingface_hub.snapshot_download(name))
    except Exception as error:  # of the network, of the hub, of the disk
        raise ConfigError(f"there is no folder {name}, and the Hugging Face hub says: {first_line(error)}.") from None
