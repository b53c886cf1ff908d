"""What gathering a layer's kernels whole is worth on a TPU: eight SwiGLU layers of FFHQ-1024, their gradient, estimated.

    python -m benchmarks.gathering v5e:4x4 [--split]

--split leaves the kernels to the partitioner (`layers.all_gather_kernel`, docs/performance.md). It needs libtpu, and no TPU.
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
    """The second half of a decoder layer, over and over; recomputed in the backward pass."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def layer(module: nn.Module, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            tower = transformer.Tower(WIDTH, 18, MLP, jnp.bfloat16)
            y = tower.mlp_norm(x)
            x = x + tower.down(layers.silu(tower.gate(y)) * tower.up(y))
            return nn.with_logical_constraint(x, ("batch", "tokens", "embed")), None

        again = nn.remat(layer, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)
        over = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": LAYERS}
        return nn.scan(again, **over, metadata_params={nn.PARTITION_NAME: "layers"})(self, x, None)[0]


def main(topology: str, *flags: str) -> None:
    if flags == ("--split",):
        layers.all_gather_kernel = lambda kernel, axes: kernel
    devices, stack = topologies.topology_devices(topology), Stack()
    mesh = partitioning.make_mesh(1, -1, 1, devices)
    shape, key = (len(devices), TOKENS, WIDTH), jax.random.key(0)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=partitioning.batch_sharding(mesh))
    with partitioning.scope(mesh):
        boxed = jax.eval_shape(lambda: stack.init(key, jnp.zeros((len(devices), 8, WIDTH), jnp.bfloat16)))
    split = partitioning.shardings(boxed, mesh)
    params = partitioning.abstract_arrays(nn.meta.unbox(boxed), split)
    with partitioning.scope(mesh):
        gradient = jax.grad(lambda params, x: stack.apply(params, x).astype(jnp.float32).sum())
        text = jax.jit(gradient, out_shardings=split).lower(params, x).compile().as_text()
    work = 3 * LAYERS * 6.0 * TOKENS * WIDTH * MLP  # of one device: an image each, backward twice the forward
    print(
        tpu_time.format_estimate(
            tpu_time.estimate(text, devices[0].device_kind, flops.peak_rate("bfloat16", devices[0]), work)
        )
    )
    for kind in hlo.COLLECTIVES:
        found = [x for x in hlo.collectives(text) if x.kind == kind]
        print(f"  {kind:<24}{sum(x.times for x in found):6.0f}, {sum(x.moved for x in found) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
