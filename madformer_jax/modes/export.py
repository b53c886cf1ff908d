"""--mode=export: the averaged weights as a workdir of their own, to sample from and to publish.

    python -m madformer_jax.main --mode=export --workdir=runs/digits

workdir/export holds the files of a model on the Hugging Face hub: config.json, model.safetensors,
README.md (the model card with the scores of --mode=evaluate), grid.png, and tokenizer.json if the
tokenizer is a user's tokenizer.json. Every mode reads its checkpoints/. Its config.json names no path, no
mesh and no other setting of this machine (`schema.portable`).
"""

import math
from typing import Any

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from madformer_jax.config import schema as config_lib
from madformer_jax.data import text
from madformer_jax.publishing import model_card
from madformer_jax.runtime import checkpoint, lock, partitioning, storage
from madformer_jax.sampling.opening import TrainedModel
from madformer_jax.weights import state_dicts


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Writes workdir/export with the averages of the newest checkpoint, or those of `sample.ema`.

    Works with any mesh and any number of processes. The folder can be moved.

    Returns:
      The step and the folder.

    Raises:
      ConfigError: No checkpoint exists, it does not fit the config or has no averages, or the disk is
        full.
    """
    config_lib.validate(c)
    storage.check_arrays_path(workdir, write=True)
    checkpoint.require(workdir)
    checkpoint.check_config(c, workdir, sections=checkpoint.MODEL_FIELDS)
    published = config_lib.portable(c)
    published.sample.weights, published.sample.step, published.sample.ema = "ema", -1, 0.0
    c = c.copy_and_resolve_references()
    c.sample.weights = "ema"
    trained = TrainedModel.open(c, workdir, step=-1)
    step, meta, params = trained.step, trained.meta, trained.params
    exported = f"{workdir.rstrip('/')}/export"
    tokenizer = text.exportable_content(c.text.tokenizer)
    with lock.acquire(exported):
        _remove_checkpoints_from(checkpoint.folder(exported), step)
        with checkpoint.Checkpoints(exported) as checkpoints:
            checkpoint.write_config(published, exported)
            checkpoints.save(step, {"ema": params}, None, meta)
        host_params = partitioning.to_host(params, trained.mesh)
        if jax.process_index() == 0:
            with storage.wrap_errors(f"{exported} cannot be written"):
                _write_hub_files(published, workdir, exported, step, host_params, meta, c.sample.ema)
                _blank_success_marks(checkpoint.folder(exported) / str(step))
                if tokenizer is not None:
                    storage.write_text(f"{exported}/{config_lib.TOKENIZER_FILE}", tokenizer)
    logging.info("exported the EMA weights of step %d to %s", step, exported)
    return {"step": step, "export": exported}


def _remove_checkpoints_from(folder: epath.Path, step: int) -> None:
    """Removes checkpoints of this step and of later steps, which an earlier export has left.

    They may belong to another training. Each is first marked as incomplete, so that a kill leaves no
    damaged checkpoint: by deleting Orbax's success mark in a bucket, and by renaming it elsewhere.
    """
    if jax.process_index() == 0 and folder.exists():
        with storage.wrap_errors(f"{folder} cannot be written"):
            for old in [path for path in folder.iterdir() if path.name.isdigit() and int(path.name) >= step]:
                target = old
                if storage.is_remote(old):
                    (old / "commit_success.txt").unlink(missing_ok=True)
                else:
                    target = folder / f"removed_{old.name}"
                    target.rmtree(missing_ok=True)
                    old.rename(target)
                target.rmtree()
    partitioning.sync("clear")


def _blank_success_marks(folder: epath.Path) -> None:
    """Empties Orbax's success marks, which contain the path of the export. Only their names matter."""
    for mark in [item / "commit_success.txt" for item in (folder, *folder.iterdir())]:
        if mark.exists():
            storage.write_text(mark, "")


def _write_hub_files(
    c: ConfigDict, workdir: str, exported: str, step: int, params: Any, meta: dict[str, Any], ema: float
) -> None:
    """Writes model.safetensors, grid.png and README.md, with the results of the average that is exported."""
    tensors = state_dicts.flatten(params)
    names = meta.get("data", {}).get("names", [])
    if not storage.is_remote(exported):  # safetensors writes local files
        state_dicts.write_state_dict(f"{exported}/model.safetensors", tensors, {"step": step, "names": names})
    grid = _find_sample_grid(workdir, step, ema)
    if grid is not None:
        storage.write_bytes(f"{exported}/grid.png", grid.read_bytes())
    files = storage.list_matching(epath.Path(workdir) / "evaluations", "*.json")
    exported_model = {"step": step, "weights": "ema"}
    results = [
        result
        for file in files
        if (result := storage.read_json_object(file, "protocol", "scores"))
        and exported_model.items() <= (protocol := result["protocol"]["images"]).items()
        and protocol.get("ema", 0.0) == ema
        and "guide" not in protocol
    ]
    parameters = sum(math.prod(x.shape) for x in tensors.values())
    storage.write_text(
        f"{exported}/README.md", model_card.render(c, step, parameters, results, grid is not None, names)
    )


def _find_sample_grid(workdir: str, step: int, ema: float) -> epath.Path | None:
    """Returns a grid of samples of the step, preferably of --mode=sample, else of the training."""
    samples = epath.Path(workdir) / "samples"
    grids = [folder / "grid.png" for folder in storage.list_matching(samples, f"step_{step:06d}_ema{ema or ''}_*")]
    training = [] if ema else [samples / f"step_{step:06d}_ema.png"]
    return next((path for path in (*grids, *training) if path.exists()), None)
