"""Measures the peak host memory of creating and saving a sharded state.

    python -m benchmarks.memory --folder=DIR

The model has 200 M parameters on 8 virtual devices, whose memory is host memory. Parameters, average
and optimizer state are 3.2 GB (docs/scaling.md).
"""

import argparse
import os
import resource

from madformer_jax.runtime import malloc

if __name__ == "__main__":
    malloc.restart_with_tunables()  # as the command line does
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from absl import logging

from madformer_jax.config import schema
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.models import madformer
from madformer_jax.runtime import checkpoint, partitioning
from madformer_jax.sampling import codec
from madformer_jax.training import train_step


def peak() -> float:
    """Returns the peak memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def run(folder: str) -> float:
    """Prints the peak after each stage.

    Returns:
      The last peak less that of Python and JAX, in sizes of the state.
    """
    c = schema.base()
    c.codec.name, c.codec.patch = "pixel", 1
    c.data.image_size, c.data.channels = 32, 4
    c.model.width, c.model.heads, c.model.mlp_width = 768, 12, 2048
    c.model.depth, c.model.diffusion_depth, c.model.blocks = 12, 6, 4
    c.model.unet_channels = (128, 256)
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, 4, 2
    schema.validate(c)
    mesh = partitioning.make_mesh(1, 4, 2)
    jax.block_until_ready(jnp.zeros(()))
    before = peak()
    s = train_step.Setup(madformer.build(c), codec.build(c), derive_sizes(c), train_step.optimizer(c))
    create, abstract = train_step.create_state(s.model, s.tx, c.seed, mesh)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract)) / 1e9
    count = sum(x.size for x in jax.tree.leaves(abstract.params))
    print(f"{count / 1e6:.0f} M parameters, state {size:.2f} GB; Python and JAX {before:.2f} GB", flush=True)
    state = jax.block_until_ready(create())
    created = peak()
    print(
        f"created: peak {created:.2f} GB, {(created - before) / size:.2f} x the state and {before:.2f} GB", flush=True
    )
    with checkpoint.Checkpoints(folder, state=abstract) as checkpoints:
        arrays = checkpoint.array_items(state)
        checkpoints.save(1, arrays, {"next_batch": 1}, {"step": 1})
        checkpoints.wait()
    saved = peak()
    print(f"saved:   peak {saved:.2f} GB, {(saved - before) / size:.2f} x the state and {before:.2f} GB", flush=True)
    return (saved - before) / size


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True)
    logging.set_verbosity(logging.ERROR)
    run(parser.parse_args().folder)
