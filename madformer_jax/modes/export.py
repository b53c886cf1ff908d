"""--mode=export: the averaged weights alone, as a workdir of their own to sample from and to publish.

workdir/export/ is what the Hugging Face hub takes: config.json, model.safetensors, README.md (the model card, with the scores that
--mode=evaluate found), grid.png, the tokenizer.json of captions, if it is none of this package's; and checkpoints/, from which every
mode reads. Its config.json names no path, no mesh and no other setting of this machine (`config.portable`).
"""

import math
from typing import Any

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.config import schema as config_lib
from madformer_jax.data import text
from madformer_jax.models import madformer
from madformer_jax.publishing import model_card
from madformer_jax.runtime import checkpoint, lock, partitioning, storage
from madformer_jax.sampling import generation
from madformer_jax.weights import state_dicts


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Writes workdir/export with config.json and the EMA weights of the newest checkpoint: a quarter of its size.

    Any mesh and any number of processes do. The folder may be moved; `--mode=sample --workdir=.../export` reads it.

    Returns:
      The step and the folder.

    Raises:
      ConfigError: there is no checkpoint, it does not fit the config or has no averages, or the disk is full.
    """
    config_lib.validate(c)
    storage.check_arrays_path(workdir, write=True)
    checkpoint.require(workdir)
    checkpoint.check_config(c, workdir, sections=checkpoint.MODEL_FIELDS)
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    target = generation.abstract_params(madformer.build(c), mesh)
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        step, restored, _ = checkpoints.restore({"ema": target})
        meta = checkpoints.meta(step)  # class names, among others
    exported = f"{workdir.rstrip('/')}/export"
    published = config_lib.portable(c)
    published.sample.weights, published.sample.step = "ema", -1
    words = text.exportable_file(c.text.tokenizer)
    with lock.acquire(exported):
        _remove_later_checkpoints(checkpoint.folder(exported), step)
        with checkpoint.Checkpoints(exported) as checkpoints:
            checkpoint.write_config(published, exported)
            checkpoints.save(step, restored, None, meta)
        whole = partitioning.to_host(restored["ema"], mesh)
        if jax.process_index() == 0:
            with storage.wrap_errors(f"{exported} cannot be written"):
                _write_hub_files(published, workdir, exported, step, whole, meta)
                _blank_success_marks(checkpoint.folder(exported) / str(step))
                if words is not None:
                    storage.write_text(f"{exported}/{config_lib.TOKENIZER_FILE}", words)
    logging.info("exported the ema weights of step %d to %s", step, exported)
    return {"step": step, "export": exported}


def _remove_later_checkpoints(folder: epath.Path, step: int) -> None:
    """Removes the checkpoints of the step and of later ones: of an earlier export, perhaps of another training.

    First it takes from each what says that it is whole: in a bucket Orbax's mark, elsewhere the name.
    """
    if jax.process_index() == 0 and folder.exists():
        with storage.wrap_errors(f"{folder} cannot be written"):
            for old in [path for path in folder.iterdir() if path.name.isdigit() and int(path.name) >= step]:
                gone = old
                if storage.is_remote(old):
                    (old / "commit_success.txt").unlink(missing_ok=True)
                else:
                    gone = folder / f"removed_{old.name}"
                    gone.rmtree(missing_ok=True)
                    old.rename(gone)
                gone.rmtree()
    partitioning.sync("clear")


def _blank_success_marks(folder: epath.Path) -> None:
    """Removes the path of the export from Orbax's marks of success, of which only the name counts."""
    for mark in [item / "commit_success.txt" for item in (folder, *folder.iterdir())]:
        if mark.exists():
            storage.write_text(mark, "")


def _write_hub_files(c: ConfigDict, workdir: str, exported: str, step: int, params: Any, meta: dict[str, Any]) -> None:
    """What the hub shows and other programs read."""
    tensors = state_dicts.flatten(params)
    names = meta.get("data", {}).get("names", [])
    if not storage.is_remote(exported):  # safetensors writes local files
        state_dicts.write_state_dict(f"{exported}/model.safetensors", tensors, {"step": step, "names": names})
    grid = _find_sample_grid(workdir, step)
    if grid is not None:
        storage.write_bytes(f"{exported}/grid.png", grid.read_bytes())
    found = [storage.read_json(path) for path in storage.list_matching(epath.Path(workdir) / "evaluations", "*.json")]
    of_these = {"step": step, "weights": "ema"}
    results = [x for x in found if of_these.items() <= x["protocol"]["images"].items()]
    parameters = sum(math.prod(x.shape) for x in tensors.values())
    storage.write_text(
        f"{exported}/README.md", model_card.render(c, step, parameters, results, grid is not None, names)
    )


def _find_sample_grid(workdir: str, step: int) -> epath.Path | None:
    """A picture of samples of the step: of --mode=sample if there is one, else of the training."""
    samples = epath.Path(workdir) / "samples"
    found = [folder / "grid.png" for folder in storage.list_matching(samples, f"step_{step:06d}_ema_*")]
    return next((path for path in (*found, samples / f"step_{step:06d}_ema.png") if path.exists()), None)
