"""Our side of `benchmarks.compare`: the programs that `--mode=benchmark` times, on random latents."""

import functools
import importlib.util
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks import turns
from madformer_jax.config import schema
from madformer_jax.models import madformer
from madformer_jax.modes import benchmark


def load_config(path: str, overrides: dict[str, str]) -> ConfigDict:
    """Reads a config file, sets fields and validates."""
    path, _, variant = path.partition(":")
    spec = importlib.util.spec_from_file_location("compared_config", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config(variant) if variant else module.get_config()
    for name, value in overrides.items():
        *sections, field = name.split(".")
        section = functools.reduce(lambda x, y: x[y], sections, c)
        kind = type(section[field])
        section[field] = value == "True" if kind is bool else kind(value)
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
