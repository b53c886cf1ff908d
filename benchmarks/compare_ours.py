"""Our side of `benchmarks.compare`: the programs that `--mode=benchmark` times, on random latents."""

import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import turns
from madformer_jax.config import schema, seeds
from madformer_jax.config.shapes import derive_sizes
from madformer_jax.cost import flops
from madformer_jax.models import madformer
from madformer_jax.runtime import partitioning
from madformer_jax.sampling import codec, generation
from madformer_jax.training import train_step


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


def training(c: ConfigDict) -> Callable[[], Any]:
    """Returns a function that runs one training step."""
    mesh, sizes, batch = partitioning.make_mesh(1, 1, 1), derive_sizes(c), c.train.batch
    identity = codec.Codec(dict, lambda params, batch, key: batch["latent"], lambda params, z: z)
    setup = train_step.Setup(madformer.build(c), identity, sizes, train_step.optimizer(c))
    create, abstract = train_step.create_state(setup.model, setup.tx, seeds.of(c, "init"), mesh)
    out_shardings = (jax.tree.map(lambda x: x.sharding, abstract), partitioning.replicated(mesh))
    step = jax.jit(train_step.make_step(setup, c), donate_argnums=0, out_shardings=out_shardings)
    rng, seed = np.random.default_rng(c.seed), np.uint32(seeds.of(c, "data"))
    local = {
        "latent": rng.standard_normal((batch, sizes.latent, sizes.latent, sizes.channels), np.float32),
        "label": rng.integers(0, max(1, c.model.classes), batch, np.int32),
    }
    with partitioning.scope(mesh):
        data = partitioning.global_batch(local, mesh)
        program = step.lower(abstract, data, {}, seed).compile()
    state = create()

    def run() -> None:
        nonlocal state
        state, metrics = program(state, data, {}, seed)
        jax.block_until_ready((state, metrics))

    return run


def sampling(c: ConfigDict) -> Callable[[], Any]:
    """Returns a function that draws `sample.batch` latents."""
    model, batch = madformer.build(c), c.sample.batch
    params = jax.jit(lambda key: nn.meta.unbox(madformer.init(model, key)))(jax.random.key(0))
    inputs = generation.make_inputs(c, np.arange(batch), np.zeros(batch, np.int32))
    program = generation.make_sample_fn(c, model, lambda _, z: z).lower(params, {}, inputs).compile()
    return lambda: jax.block_until_ready(program(params, {}, inputs))


def main(settings: dict[str, Any]) -> None:
    c = load_config(settings["config"], settings["overrides"])
    turns.tune_cpu(jax.default_backend() == "cpu")
    if settings["part"] == "train":
        run, cost = training(c), flops.training_step(c, encode=False)
    else:
        run, cost = sampling(c), flops.sampling(c, c.sample.batch)
    device = jax.local_devices()[0]
    size = 2048 if device.platform == "cpu" else 8192
    matrix = jnp.ones((size, size), c.model.dtype)
    multiply = jax.jit(jnp.matmul)
    model = madformer.build(c).config
    facts = {
        "about": f"JAX {jax.__version__} on {jax.device_count()} x {device.device_kind}, {c.model.dtype}",
        "settings": f"attention={model.attention.name} remat={model.remat} scan_unroll={model.scan_unroll}",
        "tflop": cost.total / 1e12,
    }
    turns.serve(facts, run, lambda: jax.block_until_ready(multiply(matrix, matrix)), 2.0 * size**3)


if __name__ == "__main__":
    from madformer_jax.cli import command_line

    command_line._disable_ynnpack("")
    main(json.loads(sys.argv[1]))
