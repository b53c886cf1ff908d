"""--mode=convert: converts checkpoints of the authors' release, VAEs and feature networks.

    python -m madformer_jax.main --mode=convert --config.convert.release=0210000.pt --workdir=runs/release

`weights.release`, `weights.vae_weights`, `inception_weights` and `alexnet_weights` map the tensors. To add a conversion,
add a field to `config.convert` and its function to `_SAVE`.
"""

import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
from absl import logging
from ml_collections import ConfigDict

from madformer_jax.config import schema as config_lib
from madformer_jax.config.table import HUB_ID
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation.networks import alexnet_weights, inception_weights
from madformer_jax.models import madformer
from madformer_jax.runtime import checkpoint, console, storage
from madformer_jax.weights import hub, release_config, state_dicts, vae_weights
from madformer_jax.weights.release import from_release, to_release
from madformer_jax.weights.release_config import release_args

RELEASE_FILE = "ckpts.pt"  # the checkpoint in the authors' repository JunhaoC/MADFormer-FFHQ
# Networks that become Orbax folders of the same name: field of `convert` -> function of the folder and the field's value.
_SAVE = {"vae": vae_weights.save, "inception": inception_weights.save, "alexnet": alexnet_weights.save}


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Converts the file that `config.convert` names.

    release: converts a checkpoint of the authors' release to a workdir for --mode=sample. It is a file,
      or OWNER/NAME@REVISION or OWNER/NAME@REVISION:FILE on the Hugging Face hub. The model follows
      from the arguments in the file, or from the config if the file has no arguments.
    vae, inception, alexnet: converts to the Orbax folders workdir/vae (for `config.codec.path`),
      workdir/inception and workdir/alexnet.
    to_release: converts the newest checkpoint of the workdir to a file that the release's code loads.

    Returns:
      The path of the result; for a model also the weights and the number of tensors.

    Raises:
      ConfigError: A file cannot be read or a tensor does not fit. Nothing is written.
    """
    jobs = ("release", *_SAVE, "to_release")
    chosen = [name for name in jobs if c.convert[name]]
    if len(chosen) != 1:
        chosen_names = ", ".join(chosen) or "none"
        raise ConfigError(f"--mode=convert needs one of config.convert.{{{','.join(jobs)}}}, given: {chosen_names}.")
    (name,) = chosen
    if name == "to_release":
        return _write_release_file(c, workdir)
    storage.check_arrays_path(workdir, write=True)
    if name == "release":
        return _convert_release(c, workdir)
    folder = f"{workdir}/{name}"
    _SAVE[name](folder, c.convert[name])
    use = f"; use it with {console.shell_quote(f'--config.codec.path={folder}')}" if name == "vae" else f" to {folder}"
    logging.info("converted %s%s", c.convert[name], use)
    return {"path": folder}


def _convert_release(c: ConfigDict, workdir: str) -> dict[str, Any]:
    if checkpoint.exists(workdir):
        raise ConfigError(f"--workdir={workdir} already holds a checkpoint: use another folder.")
    path, repository = _find_release_file(c.convert.release)
    content = state_dicts.read_state_dict(path, c.convert.weights)
    if content.args is not None:
        try:
            c = release_config.infer_config(content.tensors, content.args, c.codec.path)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    config_lib.validate(c)
    item = "ema" if content.weights == "ema" else "params"
    c.sample.weights = "ema" if item == "ema" else "raw"
    c.convert.release = ""  # the workdir's config must not convert again
    params = from_release(content.tensors, c, path)
    taken, count = content.weights or "only", len(content.tensors)
    del content  # frees the memory of the file before the checkpoint needs its buffers
    checkpoint.write_config(c, workdir)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        origin = repository or pathlib.Path(path).name
        checkpoints.save(0, {item: params}, None, {"converted_from": origin, "weights": taken})
    logging.info("converted the %s weights of %s, %d tensors, to %s", taken, path, count, workdir)
    return {"path": workdir, "weights": taken, "tensors": count}


def _find_release_file(release: str) -> tuple[str, str]:
    """Returns the path of a checkpoint, downloaded if it lies on the hub, and its hub id ("" for a local file)."""
    repository, _, file = release.partition(":")
    match = HUB_ID.fullmatch(repository)
    if not match or os.path.exists(release) or (pathlib.PurePath(release).suffix in state_dicts.SUFFIXES and not file):
        return release, ""
    if not match[2]:
        raise ConfigError(
            f"config.convert.release={release!r} is not a file, and as a hub id it needs a revision, which pins its "
            f"weights: {repository}@REVISION, a commit of huggingface.co/{repository}/commits/main."
        )
    file = file or RELEASE_FILE
    subject = f"config.convert.release={release!r} is not a file, and as a hub id it"
    (path,) = hub.download(subject, match[1], match[2], [(file,)])
    return str(path), f"{repository}:{file}"


def _write_release_file(c: ConfigDict, workdir: str) -> dict[str, Any]:
    checkpoint.require(workdir)
    checkpoint.check_config(c, workdir, sections=checkpoint.MODEL_FIELDS)
    args = release_args(c)
    model = madformer.build(c)
    abstract = nn.meta.unbox(jax.eval_shape(lambda key: madformer.init(model, key), jax.random.key(0)))
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), abstract)
    item = {"model": "params", "ema": "ema", "": "ema" if c.sample.weights == "ema" else "params"}[c.convert.weights]
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        step, restored, _ = checkpoints.restore({item: target})
    state_dict = to_release(restored.pop(item), c)
    state_dicts.write_state_dict(c.convert.to_release, state_dict, args)
    logging.info(
        "wrote the %s weights of step %d, %d tensors, to %s", item, step, len(state_dict), c.convert.to_release
    )
    return {"path": c.convert.to_release, "step": step, "weights": item, "tensors": len(state_dict)}
