"""--mode=export: the averaged weights alone, as a workdir of their own to sample from and to publish."""

import json
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from madformer_jax import config as config_lib
from madformer_jax import drawing
from madformer_jax.models import madformer
from madformer_jax.runtime import checkpoint, lock, partitioning


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Writes workdir/export with config.json and the EMA weights of the newest checkpoint: a quarter of its size.

    Any mesh and any number of processes do. The folder may be moved; `--mode=sample --workdir=.../export` reads it.

    Returns:
      The step and the folder.

    Raises:
      ConfigError: there is no checkpoint, it does not fit the config or has no averages, or the disk is full.
    """
    config_lib.validate(c)
    checkpoint.require(workdir)
    checkpoint.check_config(c, workdir, sections=checkpoint.OF_THE_MODEL)
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    target = drawing.abstract_params(madformer.build(c), mesh)
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        step, restored, _ = checkpoints.restore({"ema": target})
        meta = checkpoints.meta(step)  # class names, among others
    exported = f"{workdir.rstrip('/')}/export"
    published = ConfigDict(json.loads(c.to_json()))
    published.sample.weights = "ema"
    with lock.hold(exported), checkpoint.Checkpoints(exported) as checkpoints:
        checkpoint.write_config(published, exported)
        checkpoints.save(step, restored, None, meta)
    logging.info("exported the ema weights of step %d to %s", step, exported)
    return {"step": step, "export": exported}
