import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.models import attention
from madformer_jax.models.attention import KV, QKV

B, L, S, H, SIZE, T = 2, 4, 3, 2, 8, 5


def stream(seed, blocks):
    keys = jax.random.split(jax.random.key(seed), 3)
    return QKV(*(jax.random.normal(k, (B, blocks, S, H, SIZE)) for k in keys))


def text(seed=9):
    return KV(*(jax.random.normal(k, (B, T, H, SIZE)) for k in jax.random.split(jax.random.key(seed))))


CASES = {
    "both streams": ([stream(0, L), stream(1, L)], "clean", None),
    "clean one block short": ([stream(0, L - 1), stream(1, L)], "clean", None),
    "with text": ([stream(0, L - 1), stream(1, L)], "clean", text()),
    "one stream on itself": ([stream(1, L)], "clean", None),
    "block only": ([stream(0, L), stream(1, L)], None, None),
    "block only with text": ([stream(1, L)], None, text()),
}


@pytest.mark.parametrize("name", CASES)
def test_block_form_equals_the_dense_mask(name):
    streams, source, words = CASES[name]

    def total(implementation, streams, words):
        context = streams[0].kv if source else None
        outputs = attention.block_attention(streams, context, words, implementation=implementation)
        weights = [jnp.cos(jnp.arange(x.size)).reshape(x.shape) for x in outputs]
        return sum(jnp.sum(x * w) for x, w in zip(outputs, weights, strict=True)), outputs

    found, expected = (
        jax.jit(jax.value_and_grad(lambda s, w, i=i: total(i, s, w), argnums=(0, 1) if words else 0, has_aux=True))(
            streams, words
        )
        for i in ("blocks", "reference")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_a_query_sees_earlier_context_blocks_and_itself_only():
    streams = [stream(0, L), stream(1, L)]
    context = streams[0].kv
    before = attention.block_attention(streams, context, None, implementation="blocks")
    changed = KV(*(x.at[:, 2].add(1.0) for x in context))
    after = attention.block_attention(streams, changed, None, implementation="blocks")
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[:, :3], y[:, :3])
        assert float(jnp.abs(x[:, 3] - y[:, 3]).max()) > 1e-3


def test_the_cache_gives_what_training_gives():
    streams, words = [stream(0, L), stream(1, L)], text()
    context = streams[0].kv
    whole = attention.block_attention(streams, context, words, implementation="blocks")
    slots = KV(*(x[:, : L - 1].at[:, 2:].set(jnp.nan) for x in context))  # slots that are not filled yet

    @jax.jit
    def traced(own, block):
        return attention.cached_attention(own, slots, words, block, implementation="blocks")

    for n, own in enumerate(streams):
        one = QKV(*(x[:, 2:3] for x in own))
        static = attention.cached_attention(one, slots, words, 2, implementation="blocks")
        np.testing.assert_allclose(static[:, 0], whole[n][:, 2], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(traced(one, 2), static, rtol=1e-5, atol=1e-6)
