"""Estimates the time of a decoder layer of FFHQ-1024 on one TPU chip.

    python -m benchmarks.decoder v5e:2x2 1

compiles the gradient of one layer for as many images as the second argument says, and prints the estimate of `cost.tpu_time`
(docs/engineering_log.md). The layer is neither recomputed nor split over chips, so the estimate is the
layer's own time. It needs libtpu but no TPU.
"""

import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import ffhq1024
from madformer_jax.cost import flops, topologies, tpu_time
from madformer_jax.models import transformer
from madformer_jax.models.transformer import Streams
from madformer_jax.ops import rope
from madformer_jax.ops.attention.pallas import PallasAttention
from madformer_jax.runtime import partitioning


def main(topology: str, count: str) -> None:
    c, images = ffhq1024.get_config(), int(count)
    m, device = c.model, topologies.topology_devices(topology)[0]
    towers = {"clean": "clean", "pred": "pred"}
    layer = transformer.DecoderLayer(m.width, m.heads, m.mlp_width, jnp.bfloat16, towers, False, PallasAttention())
    angles = rope.rotary_table(*rope.image_positions(4, 16, 4), head_size=64, side=64, variant=m.rope)
    positions = {"clean": rope.RotaryTable(*(x[:15] for x in angles)), "pred": angles}
    mesh = partitioning.make_mesh(1, 1, 1, [device])
    replicated, key = partitioning.replicated(mesh), jax.random.key(0)

    def total(params: Any, streams: Streams) -> jax.Array:
        out, _ = layer.apply(params, streams, positions, None, ())
        return sum((jnp.square(x.astype(jnp.float32)).mean() for x in out.as_dict.values()), jnp.zeros(()))

    shapes = Streams(
        *(jax.ShapeDtypeStruct((1, images * n * 256, m.width), jnp.bfloat16) for n in (0, 15, 16))
    )._replace(text=None)
    with partitioning.scope(mesh):
        boxed = jax.eval_shape(lambda x: layer.init(key, x, positions, None, ()), shapes)
    args = partitioning.abstract_arrays(
        (nn.meta.unbox(boxed), shapes), jax.tree.map(lambda _: replicated, (nn.meta.unbox(boxed), shapes))
    )
    with partitioning.scope(mesh):
        text = jax.jit(jax.grad(total, (0, 1)), out_shardings=replicated).lower(*args).compile().as_text()
    rows, d = 31 * 256, m.width
    # Both streams together attend to L^2 = 256 pairs of blocks.
    work = images * 3 * (2.0 * rows * d * (4 * d + 3 * m.mlp_width) + 2 * 2.0 * 256 * 256**2 * d)
    print(
        tpu_time.format_estimate(tpu_time.estimate(text, device.device_kind, flops.peak_rate("bfloat16", device), work))
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
