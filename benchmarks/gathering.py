"""Estimates the gain of gathering a layer's sharded kernels whole on a TPU.

    python -m benchmarks.gathering v5e:4x4 [--split]

compiles the gradient of eight SwiGLU layers of FFHQ-1024 and prints the estimate of `cost.tpu_time`
and the collectives (docs/engineering_log.md). With --split, the partitioner decides what to gather
instead of `layers.all_gather_kernel`. It needs libtpu but no TPU.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp

from madformer_jax.cost import flops, hlo, topologies, tpu_time
from madformer_jax.models import layers, transformer
from madformer_jax.runtime import partitioning

WIDTH, MLP, TOKENS, LAYERS = 1152, 4096, 4096, 8


class Stack(nn.Module):
    """The SwiGLU half of a decoder layer, scanned and recomputed in the backward pass."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def layer(module: nn.Module, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            tower = transformer.Tower(WIDTH, 18, MLP, jnp.bfloat16)
            y = tower.mlp_norm(x)
            x = x + tower.down(layers.silu(tower.gate(y)) * tower.up(y))
            return nn.with_logical_constraint(x, ("batch", "tokens", "embed")), None

        remat = nn.remat(layer, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": LAYERS}
        return nn.scan(remat, **axes, metadata_params={nn.PARTITION_NAME: "layers"})(self, x, None)[0]


def main(topology: str, *flags: str) -> None:
    if flags == ("--split",):
        layers.all_gather_kernel = lambda kernel, axes: kernel
    devices, stack = topologies.topology_devices(topology), Stack()
    mesh = partitioning.make_mesh(1, -1, 1, devices)
    shape, key = (len(devices), TOKENS, WIDTH), jax.random.key(0)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=partitioning.batch_sharding(mesh))
    with partitioning.scope(mesh):
        boxed = jax.eval_shape(lambda: stack.init(key, jnp.zeros((len(devices), 8, WIDTH), jnp.bfloat16)))
    shardings = partitioning.shardings(boxed, mesh)
    params = partitioning.abstract_arrays(nn.meta.unbox(boxed), shardings)
    with partitioning.scope(mesh):
        gradient = jax.grad(lambda params, x: stack.apply(params, x).astype(jnp.float32).sum())
        text = jax.jit(gradient, out_shardings=shardings).lower(params, x).compile().as_text()
    work = 3 * LAYERS * 6.0 * TOKENS * WIDTH * MLP  # FLOPs of one device: one image, backward twice the forward
    print(
        tpu_time.format_estimate(
            tpu_time.estimate(text, devices[0].device_kind, flops.peak_rate("bfloat16", devices[0]), work)
        )
    )
    for kind in hlo.COLLECTIVES:
        moves = [x for x in hlo.collectives(text) if x.kind == kind]
        print(f"  {kind:<24}{sum(x.times for x in moves):6.0f}, {sum(x.moved for x in moves) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
