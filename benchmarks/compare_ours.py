"""Our side of `benchmarks.compare`: the programs that `--mode=benchmark` times, on random latents."""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks import turns
from madformer_jax.cli import command_line
from madformer_jax.config import schema
from madformer_jax.models import madformer
from madformer_jax.modes import benchmark


def load_config(path: str, overrides: dict[str, str]) -> ConfigDict:
    """Reads a config file, sets fields and validates."""
    fields = [f"--config.{name}={value}" for name, value in overrides.items()]
    c, _ = command_line.parse(["compare", "--mode=compile", f"--config={path}", *fields])  # a mode without --workdir
    schema.validate(c)
    return c


def main(settings: dict[str, Any]) -> None:
    c = load_config(settings["config"], settings["overrides"])
    turns.tune_cpu(jax.default_backend() == "cpu")
    if settings["workload"] == "train":
        program = benchmark.training_program(c)
    else:
        program = benchmark.sampling_program(c)
    device = jax.local_devices()[0]
    size = 2048 if device.platform == "cpu" else 8192
    matrix = jnp.ones((size, size), c.model.dtype)
    multiply = jax.jit(jnp.matmul)
    model = madformer.build(c).config
    facts = {
        "about": f"JAX {jax.__version__} on {jax.device_count()} x {device.device_kind}, {c.model.dtype}",
        "settings": f"attention={model.attention.name} remat={model.remat} scan_unroll={model.scan_unroll}",
        "tflop": program.cost.total / 1e12,
    }
    turns.serve(facts, program.run, lambda: jax.block_until_ready(multiply(matrix, matrix)), 2.0 * size**3)


if __name__ == "__main__":
    from madformer_jax.runtime import xla_flags

    xla_flags.disable_ynnpack("")
    main(json.loads(sys.argv[1]))
