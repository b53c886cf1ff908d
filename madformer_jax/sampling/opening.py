"""Opening a trained model: its weights, codec and class names, from a workdir or an export.

`modes.sample` and `trained_model` open models with `TrainedModel.open`. Other modes that need the
weights of one step should do so too.
"""

import os
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from madformer_jax.data import text
from madformer_jax.models import madformer
from madformer_jax.models.madformer import MADFormer
from madformer_jax.runtime import checkpoint, memory, partitioning
from madformer_jax.sampling import codec, generation
from madformer_jax.weights import state_dicts


@dataclass(frozen=True)
class TrainedModel:
    """The network, weights, codec and class names of one step of a training run."""

    mesh: Mesh
    network: MADFormer
    params: Any  # sharded over the mesh
    codec: codec.Codec
    class_names: list[str]  # empty if the data have none
    step: int  # -1 for an export without a step
    newest_step: int | None  # of all checkpoints, whole or damaged; None without checkpoints

    @classmethod
    def open(cls, c: ConfigDict, workdir: str, step: int | None = None, check_memory_for: str = "") -> "TrainedModel":
        """Restores the weights of `sample.weights` from checkpoints or from model.safetensors.

        Args:
          c: A validated config. Its mesh and codec may differ from those of the workdir. A
            `codec.scaling_factor` of 0 becomes that of the workdir.
          workdir: Folder of a run, of an export or of a converted release.
          step: The step, or -1 for the newest whole checkpoint. By default `sample.step`.
          check_memory_for: The purpose, such as "sampling", for the error if the weights do not fit
            into memory. By default their size is not checked.

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
        if not checkpoint.exists(workdir) and os.path.exists(tensors):
            params, metadata = _load_safetensors(tensors, target)
            names = list(metadata.get("names", ()))
            return cls(mesh, network, params, codec.build(c), names, int(metadata.get("step", -1)), None)
        checkpoint.require(workdir)
        with partitioning.scope(mesh), checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
            newest = checkpoints.last
            step, params = checkpoints.restore_weights(
                c.sample.weights, target, c.sample.step if step is None else step
            )
            names = checkpoints.class_names(step)
            text.check_tokenizer_identity(c, checkpoints.meta(step), step, workdir)
        return cls(mesh, network, params, codec.build(c), names, step, newest)

    def load_codec_params(self) -> Any:
        """Loads the codec's weights onto all devices of the mesh.

        Raises:
          ConfigError: The codec has no weights, or they do not fit the config.
        """
        return jax.device_put(self.codec.load(), partitioning.replicated(self.mesh))


def _load_safetensors(path: str, target: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the parameters and the metadata of an export's model.safetensors."""
    tensors, metadata, _ = state_dicts.read_state_dict(path)
    tree = state_dicts.unflatten(tensors, target, path)
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), tree, target)
    return params, dict(metadata or {})
