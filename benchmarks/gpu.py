"""Compares attention and the model on an NVIDIA GPU with float32 references, and times attention.

    python -m benchmarks.gpu

prints relative errors |x - y| / |y| over all outputs and over all gradients. It then prints the
median milliseconds of 20 calls of a layer's attention at FFHQ-1024 (16 blocks of 256 tokens, 18 heads
of 64) on random numbers. docs/engineering_log.md has the figures.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from madformer_jax.config import schema
from madformer_jax.diffusion import losses
from madformer_jax.models import madformer
from madformer_jax.ops.attention.api import IMPLEMENTATIONS
from madformer_jax.ops.attention.base import KV, QKV, Attention
from tests import tiny

NAMES = ("cudnn", "blocks")
LOOP_STEPS = 20


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def stream(seed: int, batch: int, blocks: int, tokens: int, heads: int, size: int) -> QKV:
    return QKV(*(random(3 * seed + i, batch, blocks, tokens, heads, size) for i in range(3)))


def error(actual: Any, expected: Any) -> float:
    """Returns the relative error over all leaves of two trees."""
    squares = [
        (np.sum((np.asarray(x, np.float64) - y) ** 2), np.sum(np.asarray(y, np.float64) ** 2))
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ]
    error_sum, norm_sum = map(sum, zip(*squares, strict=True))
    return float(np.sqrt(error_sum / norm_sum))


def total(streams: list[QKV], text: KV | None, lengths: Any, weights: Any, implementation: str, context: bool) -> Any:
    """Returns the weighted sum of the outputs of attention, and the outputs."""
    attention = IMPLEMENTATIONS[implementation]
    outputs = attention.block_attention(streams, streams[0].kv if context else None, text, lengths)
    return sum(jnp.sum(x.astype(jnp.float32) * w) for x, w in zip(outputs, weights, strict=True)), outputs


def value_and_gradient(
    streams: Any, text: Any, lengths: Any, weights: Any, context: bool, implementation: str, dtype: Any
) -> Any:
    streams, text = jax.tree.map(lambda x: x.astype(dtype), (streams, text))
    gradient = jax.value_and_grad(total, argnums=0 if text is None else (0, 1), has_aux=True)
    (_, outputs), gradients = jax.jit(gradient, static_argnums=(4, 5))(
        streams, text, lengths, weights, implementation, context
    )
    return outputs, gradients


def attentions() -> None:
    """Prints the errors of attention in training against the dense mask in float32."""
    print("attention, error of outputs and gradients in bfloat16" + "".join(f"{x:>12}" for x in NAMES))
    for name, blocks, text_tokens, lengths, context in (
        ("one block", (1, 1), 0, None, True),
        ("4 blocks", (3, 4), 0, None, True),
        ("16 blocks, a class", (15, 16), 1, None, True),
        ("11 blocks, padded text", (10, 11), 40, np.array([7, 40], np.int32), True),
        ("no context", (4, 4), 0, None, False),
        ("one stream", (8,), 3, None, True),
    ):
        streams = [stream(n, 2, count, 64, 4, 64) for n, count in enumerate(blocks)]
        text = KV(*(random(90 + i, 2, text_tokens, 4, 64) for i in range(2))) if text_tokens else None
        weights = [random(50 + n, *x.k.shape) for n, x in enumerate(streams)]
        streams, text = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (streams, text))

        run = functools.partial(value_and_gradient, streams, text, lengths, weights, context)
        with jax.default_matmul_precision("highest"):
            exact = run("reference", jnp.float32)
        results = [run(x, jnp.bfloat16) for x in NAMES]
        print(f"  {name:<51}" + "".join(f"  {error(x[0], exact[0]):.4f} {error(x[1], exact[1]):.4f}" for x in results))


def cached() -> None:
    """Prints the errors of attention with the cache against attention in training."""
    streams = [stream(n, 2, 8, 64, 4, 64) for n in range(2)]
    text = KV(random(7, 2, 5, 4, 64), random(8, 2, 5, 4, 64))
    with jax.default_matmul_precision("highest"):
        exact = IMPLEMENTATIONS["reference"].block_attention(streams, streams[0].kv, text)[1]
    qkv, *cached_kv = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (streams[1], streams[0].kv, text))
    one_layer = jax.tree.map(lambda x: x[None], cached_kv)
    for implementation in NAMES:
        attention = IMPLEMENTATIONS[implementation]
        context, cached_text = (attention.to_cache_layout(x) for x in one_layer)
        attend = jax.jit(
            lambda qkv, block, c=context, t=cached_text, x=attention: x.cached_attention(qkv, c, t, 0, block)
        )
        blocks = [attend(QKV(*(x[:, i : i + 1] for x in qkv)), i)[:, 0] for i in range(8)]
        print(f"cache, {implementation}: {error(jnp.stack(blocks, axis=1), exact):.4f}")


def model() -> None:
    """Prints the errors of loss and gradient of a small model against float32 on the CPU."""

    def run(dtype: str, implementation: str, device: str) -> Any:
        c = tiny.get_config()
        c.model.width, c.model.heads, c.model.unet_channels, c.model.unet_groups = 128, 2, (64,), 8
        c.model.dtype, c.model.attention = dtype, implementation
        schema.validate(c)
        built = madformer.build(c, device)
        with jax.default_device(jax.devices(device)[0]):
            z = random(1, 4, *built.config.sizes.block_shape)
            noise, t = random(2, *z.shape), jnp.arange(16).reshape(4, 4) * 60
            params = jax.jit(lambda: nn.meta.unbox(madformer.init(built, jax.random.key(0))))()

            def loss(params: Any) -> Any:
                outputs = built.apply({"params": params}, z, 0.7 * z + 0.7 * noise, t, jnp.zeros((4, 1), jnp.int32))
                terms = losses.unweighted_terms(outputs, z, noise, None)
                return terms["image"] + 0.1 * terms["hidden"]

            return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))

    exact = run("float32", "blocks", "cpu")
    for dtype, implementation, precision in (
        ("float32", "blocks", "highest"),
        ("float32", "blocks", None),
        ("bfloat16", "blocks", None),
        ("bfloat16", "cudnn", None),
    ):
        with jax.default_matmul_precision(precision):
            result = run(dtype, implementation, "gpu")
        print(
            f"model, {dtype}, {implementation}, precision {precision or 'default'}: loss {error(result[0], exact[0]):.2e}, "
            f"gradient {error(result[1], exact[1]):.2e}"
        )


def median(function: Callable[..., Any], *args: Any) -> float:
    """Returns the median milliseconds of 20 calls."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(20):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def attend_in_loop(attention: Attention, qkv: QKV, context: KV, block: jax.Array) -> jax.Array:
    """Attends to one layer of the cache `LOOP_STEPS` times, as in the loop over solver steps."""

    def step(_: Any, carry: Any) -> Any:
        out, cache = carry
        moved = qkv._replace(q=qkv.q + 1e-3 * out)  # makes every step depend on the one before
        if attention.unrolls_layers:
            return attention.write_and_attend(moved, cache, None, block)
        return attention.cached_attention(moved, cache, None, 0, block), cache

    if attention.unrolls_layers:  # with room for the last block
        context = KV(*(jnp.pad(x[0], ((0, 0), (0, qkv.v.shape[2]), (0, 0), (0, 0))) for x in context))
    return jax.lax.fori_loop(0, LOOP_STEPS, step, (jnp.zeros_like(qkv.v), context))[0]


def times(batch: int = 8) -> None:
    """Prints the times of attention of one layer at the size of FFHQ-1024."""
    streams = [stream(n, batch, 15 + n, 256, 18, 64) for n in range(2)]
    weights = [x.q for x in streams]
    streams = jax.tree.map(lambda x: x.astype(jnp.bfloat16), streams)
    pairs = 256**2 * sum(sum(range(1, x.k.shape[1] + 1)) for x in streams)
    flop = 4.0 * batch * 18 * 64 * pairs
    for implementation in NAMES:
        attention = IMPLEMENTATIONS[implementation]
        forward = jax.jit(lambda streams, x=attention: x.block_attention(streams, streams[0].kv, None))
        gradient = jax.jit(jax.grad(lambda s, x=implementation: total(s, None, None, weights, x, True)[0]))
        forward_ms, both_ms = median(forward, streams), median(gradient, streams)
        print(
            f"layer, batch {batch}, {implementation}: forward {forward_ms:.2f} ms ({flop / forward_ms / 1e9:.0f} TFLOP/s), "
            f"with gradient {both_ms:.2f} ms ({3.5 * flop / both_ms / 1e9:.0f} TFLOP/s)"
        )
    qkv, slots = QKV(*(x[:, :1] for x in streams[1])), KV(*(x[None] for x in streams[0].kv))
    for implementation in NAMES:
        attention = IMPLEMENTATIONS[implementation]
        attend = jax.jit(functools.partial(attend_in_loop, attention))
        times_ms = [median(attend, qkv, attention.to_cache_layout(slots), i) / LOOP_STEPS for i in (0, 7, 15)]
        print(
            f"cache, batch {batch}, {implementation}, blocks 0, 7, 15: "
            + ", ".join(f"{x:.3f}" for x in times_ms)
            + " ms"
        )


if __name__ == "__main__":
    print(jax.__version__, jax.devices()[0].device_kind)
    attentions()
    cached()
    model()
    times()
