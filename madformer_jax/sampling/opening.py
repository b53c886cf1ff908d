"""Opening a trained model: its weights, codec and class names, from a workdir or an export.

`TrainedModel.open` is the one way to open a trained model. `modes.sample`, `modes.evaluate`,
`modes.sweep`, `modes.export` and `trained_model` call it.
"""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from madformer_jax.config import block_steps, elastic_depth, fields, identity
from madformer_jax.config import schema as config_lib
from madformer_jax.data import text
from madformer_jax.diffusion.autoguidance import GuidedPair
from madformer_jax.errors import ConfigError
from madformer_jax.models import ema, layer_split, madformer
from madformer_jax.models.madformer import MADFormer
from madformer_jax.runtime import checkpoint, memory, partitioning, stored_config
from madformer_jax.sampling import codec, generation
from madformer_jax.weights import state_dicts
from madformer_jax.weights.fingerprint import fingerprint

MAX_PROFILE_ERROR = 0.1  # relative error of a combined profile above which opening warns


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The network, weights, codec and class names of one step of a training run."""

    mesh: Mesh
    network: MADFormer
    params: Any  # sharded over the mesh
    codec: codec.Codec
    meta: dict[str, Any]  # of the checkpoint: data set, class names, tokenizer
    step: int  # -1 for an export without a step
    newest_step: int | None  # of all checkpoints, whole or damaged; None without checkpoints
    guide: "TrainedModel | None" = None  # the model of `sample.guide`

    @classmethod
    def open(
        cls,
        c: ConfigDict,
        workdir: str,
        step: int | None = None,
        check_memory_for: str = "",
        guide: "TrainedModel | None" = None,
    ) -> "TrainedModel":
        """Opens the model of a folder, and that of `sample.guide`.

        Restores the weights of `sample.weights` and `sample.ema` from checkpoints or model.safetensors.

        Args:
          c: A validated config. Its mesh and codec may differ from those of the workdir. A
            `codec.scaling_factor` of 0 becomes that of the workdir.
          workdir: Folder of a run, of an export or of a converted release.
          step: The step, or -1 for the newest whole checkpoint. By default `sample.step`.
          check_memory_for: The purpose, such as "sampling", for the error if the weights do not fit
            into memory. By default their size is not checked.
          guide: The model of `sample.guide` if it is open already.

        Raises:
          ConfigError: The folder has no model, or the model is damaged, does not fit the config or
            the memory, or was trained with another tokenizer.
        """
        codec.adopt_scale(c, workdir)
        mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
        network = madformer.build(c)
        target = generation.abstract_params(network, mesh)
        if check_memory_for:
            memory.check_state_fits(check_memory_for, mesh, parameters=target)
        tensors = os.path.join(workdir, "model.safetensors")
        if not checkpoint.exists(workdir) and epath.Path(tensors).exists():
            params, metadata = _load_safetensors(tensors, target)
            meta = {"data": {"names": list(metadata.get("names", ()))}}
            step = int(metadata.get("step", -1))
            return cls(mesh, network, params, codec.build(c), meta, step, None, guide or open_guide(c))
        checkpoint.require(workdir)
        with partitioning.scope(mesh), checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
            newest, step = checkpoints.last, c.sample.step if step is None else step
            if c.sample.ema:
                step, params = _combine_snapshots(c, checkpoints, target, step)
            else:
                item = "ema" if c.sample.weights == "ema" else "params"
                step, trees, _ = checkpoints.restore({item: target}, step=None if step < 0 else step)
                params = trees[item]
            meta = checkpoints.meta(step)
            text.check_tokenizer_identity(c, meta, step, workdir)
        return cls(mesh, network, params, codec.build(c), meta, step, newest, guide or open_guide(c))

    @property
    def class_names(self) -> list[str]:
        """Class names of the training data; empty if the data name no classes."""
        return list(self.meta.get("data", {}).get("names", ()))

    def sampled(self, c: ConfigDict) -> tuple[MADFormer | GuidedPair, Any]:
        """Returns the network and the parameters that draw the images of a config.

        The network has the D of `sample.diffusion_depth`, and the parameters stay as they are stored. They
        are pairs with those of the guide unless the config's guidance scale is 1.
        """
        network = layer_split.with_depth(self.network, elastic_depth.sampled_depth(c))
        if self.guide is None or c.sample.guidance == 1.0:
            return network, self.params
        return GuidedPair(network, self.guide.network), (self.params, self.guide.params)

    def with_depth(self, depth: int) -> "TrainedModel":
        """Returns the model with D = `depth`, and parameters in its layout."""
        network = layer_split.with_depth(self.network, depth)
        if network is self.network:
            return self
        params = jax.jit(functools.partial(layer_split.fit, network))(self.params)
        return dataclasses.replace(self, network=network, params=params)

    def protocol(self, c: ConfigDict) -> dict[str, Any]:
        """Returns the entries of a protocol for settings of `sample` that older protocols do not name.

        They are `ema`, `steps_by_block`, `diffusion_depth`, `context_noise` and the guide, if they are not at
        their defaults.
        """
        values: dict[str, Any] = {"ema": c.sample.ema} if c.sample.ema else {}
        if c.sample.steps_by_block != block_steps.CONSTANT:
            values["steps_by_block"] = list(block_steps.steps_of_blocks(c))
        values |= {name: c.sample[name] for name in ("diffusion_depth", "context_noise") if c.sample[name]}
        if self.guide is not None and c.sample.guidance != 1.0:
            weights = fingerprint(self.guide.params, self.mesh)
            values["guide"] = {"step": self.guide.step, "fingerprint": weights}
        return values

    def load_codec_params(self) -> Any:
        """Loads the codec's weights onto all devices of the mesh.

        Raises:
          ConfigError: The codec has no weights, or they do not fit the config.
        """
        return jax.device_put(self.codec.load(), partitioning.replicated(self.mesh))


# Fields that a guide must share with the model that it guides.
_GUIDE_FIELDS = (
    "model.blocks", "model.block_shape", "model.block_order", "model.classes", "model.prediction_type",
    "model.clean_stream", "model.clean_timestep",
    "diffusion.path", "diffusion.shift", "text.vocabulary", "text.length", "text.caption", "codec",
    "data.image_size", "data.channels",
)  # fmt: skip


def open_guide(c: ConfigDict) -> TrainedModel | None:
    """Opens the model of `sample.guide`; None if the config names none.

    Raises:
      ConfigError: The folder has no model, or its blocks, latents or conditions are not those of the
        config.
    """
    guide = stored_config.guide_config(c)
    if guide is None:
        return None
    try:
        ours, theirs = fields.flat(c), fields.flat(guide)
        different = [
            f"config.{name} is {theirs[name]!r} in the guide and {ours[name]!r} in this model"
            for name in ours
            if {name, name.split(".")[0]} & set(_GUIDE_FIELDS)
            if identity.affects_results(name) and ours[name] != theirs[name]
        ]
        if different:
            raise ConfigError(f"it cannot guide this model: {'; '.join(different)}.")
        config_lib.validate(guide)
        return TrainedModel.open(guide, c.sample.guide)
    except ConfigError as error:
        raise ConfigError(f"config.sample.guide={c.sample.guide}: {error}") from error


def _combine_snapshots(c: ConfigDict, checkpoints: checkpoint.Checkpoints, target: Any, step: int) -> tuple[int, Any]:
    """Returns a step and its average of the width `sample.ema`, from the snapshots up to this step.

    Snapshots are read one after the other, so that three sets of parameters are in memory.

    Raises:
      ConfigError: The training stored no snapshots, or one is missing or damaged.
    """
    if not c.train.ema_snapshots:
        raise ConfigError(
            f"config.sample.ema={c.sample.ema:g} needs a training with config.train.ema_snapshots: this one stored no snapshots."
        )
    targets = {"power_ema": dict.fromkeys(ema.PROFILES, target)}
    step, trees, _ = checkpoints.restore(targets, step=None if step < 0 else step)
    steps = [s for s in checkpoints.steps if s < step and s % c.train.ema_snapshots == 0] + [step]
    weights, error = ema.combine(steps, c.sample.ema)
    logging.log(
        logging.WARNING if error > MAX_PROFILE_ERROR else logging.INFO,
        "sample.ema=%g: %d snapshots up to step %d give this average; the error of its profile is %.2g %%",
        c.sample.ema, len(steps), step, 100 * error,
    )  # fmt: skip

    @jax.jit
    def add(total: Any, averages: list[Any], weights: Any) -> Any:
        return jax.tree.map(lambda x, *trees: x + sum(w * y for w, y in zip(weights, trees)), total, *averages)

    total = jax.tree.map(jnp.zeros_like, trees["power_ema"]["wide"])
    for snapshot, row in reversed(list(zip(steps, weights.astype(np.float32)))):
        if snapshot != step:
            trees = checkpoints.restore(targets, step=snapshot)[1]
        total = add(total, [trees["power_ema"][name] for name in ema.PROFILES], list(row))
    return step, total


def _load_safetensors(path: str, target: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the parameters and the metadata of an export's model.safetensors."""
    tensors, metadata, _ = state_dicts.read_state_dict(path)
    tree = state_dicts.unflatten(tensors, target, path)
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), tree, target)
    return params, dict(metadata or {})
