"""--mode=sample: images from a workdir's newest checkpoint."""

import json

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from madformer_jax import codec, drawing
from madformer_jax import config as config_lib
from madformer_jax.models import attention, madformer
from madformer_jax.runtime import checkpoint, partitioning


def run(c: ConfigDict, workdir: str) -> None:
    """--mode=sample: writes workdir/samples/<protocol>.png and .npz with `sample.n` images from the newest checkpoint.

    Raises:
      ConfigError: a setting is wrong, there is no checkpoint, or it does not fit; nothing is written then.
    """
    config_lib.validate(c)
    checkpoint.require(workdir)
    checkpoint.check_config(c, workdir, sections=("model", "codec"))
    mesh = partitioning.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    model, images_codec = madformer.build(c), codec.build(c)
    target = drawing.abstract_params(model, mesh)
    with partitioning.scope(mesh):
        item = "ema" if c.sample.weights == "ema" else "params"
        with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
            step, restored, _ = checkpoints.restore({item: target})
        logging.info(
            "sampling %d images with the %s weights of step %d; attention %s",
            c.sample.n, c.sample.weights, step, attention.in_sampling(model.attention),
        )  # fmt: skip
        draw = drawing.make_draw(c, model, images_codec.decode)
        codec_params = jax.device_put(images_codec.load(), partitioning.replicated(mesh))
        drawn = drawing.batches(c, draw, restored[item], codec_params, mesh, range(c.sample.n))
        _, labels, images, latents = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    if jax.process_index():
        return
    s = c.sample
    origin = f"noise-{epath.Path(s.noise).stem}" if s.noise else f"seed{c.seed}"
    protocol = {"step": step, "seed": c.seed, "noise": s.noise} | {
        name: s[name] for name in ("weights", "solver", "spacing", "steps", "guidance", "clip", "n")
    }
    name = f"step_{step:06d}_{s.weights}_{s.solver}_{s.spacing}{s.steps}_w{s.guidance:g}_{origin}_n{s.n}"
    folder = epath.Path(workdir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{name}.npz.part"
    with part.open("wb") as file:
        np.savez(file, images=images, latents=latents, labels=labels, protocol=json.dumps(protocol))
    part.replace(folder / f"{name}.npz")
    drawing.write_png(folder / f"{name}.png", drawing.as_grid(images))
    logging.info("wrote %s.png and .npz to %s", name, folder)
