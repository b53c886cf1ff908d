import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from madformer_jax.models import attention, cudnn, splash
from madformer_jax.models.attention import KV, QKV
from madformer_jax.models.squares import squares
from madformer_jax.runtime import partitioning

B, L, S, H, SIZE, T = 2, 4, 3, 2, 8, 5


def stream(seed, blocks, tokens=S):
    keys = jax.random.split(jax.random.key(seed), 3)
    return QKV(*(jax.random.normal(k, (B, blocks, tokens, H, SIZE)) for k in keys))


def text(seed=9):
    return KV(*(jax.random.normal(k, (B, T, H, SIZE)) for k in jax.random.split(jax.random.key(seed))))


LENGTHS = np.array([2, 4])  # of the text; the rest of its T tokens is padding
CASES = {
    "both streams": ([stream(0, L), stream(1, L)], "clean", None),
    "clean one block short": ([stream(0, L - 1), stream(1, L)], "clean", None),
    "with text": ([stream(0, L - 1), stream(1, L)], "clean", text()),
    "one stream on itself": ([stream(1, L)], "clean", None),
    "a cut-off pair at every size": ([stream(0, 10), stream(1, 11)], "clean", None),
    "block only": ([stream(0, L), stream(1, L)], None, None),
    "block only with text": ([stream(1, L)], None, text()),
    "padded text": ([stream(0, L - 1), stream(1, L)], "clean", text(), LENGTHS),
}


def value_and_gradient(implementation, streams, source, words, lengths=None, *, images=1):
    """Outputs and gradients; the weights of the sum make every output count differently."""

    def total(streams, words):
        given = [stream.k.shape for stream in streams]
        streams, words = jax.tree.map(lambda x: x.reshape(B // images, -1, *x.shape[2:]), (streams, words))
        context = streams[0].kv if source else None
        outputs = attention.block_attention(
            streams, context, words, lengths, implementation=implementation, images=images
        )
        outputs = [x.reshape(shape) for x, shape in zip(outputs, given, strict=True)]
        weights = [jnp.cos(jnp.arange(x.size)).reshape(x.shape) for x in outputs]
        return sum(jnp.sum(x * w) for x, w in zip(outputs, weights, strict=True)), outputs

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1) if words else 0, has_aux=True))(streams, words)


def _weights(q, k, lengths, logs=None):
    """exp(scores - log-sums) in (B, S, K, H), and the log-sums."""
    scores = jnp.einsum("bshd,bkhd->bskh", q, k) * q.shape[-1] ** -0.5
    if lengths is not None:
        scores = jnp.where(jnp.arange(k.shape[1])[:, None] < lengths[:, None, None, None], scores, -jnp.inf)
    logs = jax.nn.logsumexp(scores, axis=2) if logs is None else logs
    return jnp.exp(scores - logs[:, :, None]), logs


def _flash(q, k, v, lengths=None):
    weights, logs = _weights(q, k, lengths)
    return jnp.einsum("bskh,bkhd->bshd", weights, v), logs


def _flash_gradient(q, k, v, lengths, out, logs, gradient):
    """As FlashAttention's backward pass, of which `out` and `logs` may know more keys than these."""
    weights, _ = _weights(q, k, lengths, logs)
    before = jnp.einsum("bshd,bkhd->bskh", gradient, v) - (gradient * out).sum(axis=-1)[:, :, None]
    d_scores = weights * before * q.shape[-1] ** -0.5
    return (
        jnp.einsum("bskh,bkhd->bshd", d_scores, k),
        jnp.einsum("bskh,bshd->bkhd", d_scores, q),
        jnp.einsum("bskh,bshd->bkhd", weights, gradient),
    )


@pytest.fixture
def no_cudnn(monkeypatch):
    """What `cudnn` runs, with products of XLA's in the place of cuDNN's calls."""
    monkeypatch.setattr(cudnn, "flash", _flash)
    monkeypatch.setattr(cudnn, "flash_gradient", _flash_gradient)


def assert_equal_trees(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("name", CASES)
def test_block_form_equals_the_dense_mask(name):
    assert_equal_trees(*(value_and_gradient(i, *CASES[name]) for i in ("blocks", "reference")))


@pytest.mark.parametrize("name", CASES)
def test_squares_of_cudnn_equal_the_dense_mask(name, no_cudnn):
    assert_equal_trees(*(value_and_gradient(i, *CASES[name]) for i in ("cudnn", "reference")))


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 8, 11, 16])
def test_squares_hold_every_pair_of_blocks_once(blocks):
    seen = np.zeros((blocks, blocks), int)
    number = np.arange(blocks)[None, :, None]
    for square in squares(blocks):
        for rows, keys in zip(square.queries(number), square.keys(number), strict=True):
            seen[np.ix_(rows, keys)] += 1
    np.testing.assert_array_equal(seen, np.tri(blocks, k=-1))


@pytest.mark.parametrize("implementation", ["reference", "blocks", "cudnn", "splash_interpret"])
def test_padding_moves_nothing_at_all(implementation, no_cudnn):
    """Neither outputs nor gradients, and it gets no gradient; in the cache as in training."""
    streams, source, words, lengths = CASES["padded text"]
    padding = (np.arange(T) >= lengths[:, None])[..., None, None]
    others = KV(*(jnp.where(padding, x + 3, x) for x in words))
    found, other = (value_and_gradient(implementation, streams, source, x, lengths) for x in (words, others))
    jax.tree.map(np.testing.assert_array_equal, found, other)
    for gradient in found[1][1]:
        assert not np.where(padding, gradient, 0).any() and (gradient[:, 0] != 0).all()
    if implementation in ("blocks", "cudnn"):
        own = QKV(*(x[:, 2:3] for x in streams[1]))
        read = functools.partial(attention.cached_attention, own, streams[0].kv, implementation=implementation)
        cached = read(words, 2, lengths)
        np.testing.assert_array_equal(cached, read(others, 2, lengths))
        np.testing.assert_allclose(cached[:, 0], found[0][1][1][:, 2], rtol=1e-4, atol=1e-5)


WHOLE = 128  # tokens of a block that is one tile of the TPU's kernel
SPLASH = {
    "whole tiles, clean one block short, text": ([stream(0, L - 1, WHOLE), stream(1, L, WHOLE)], "clean", text()),
    "blocks share tiles, text": CASES["with text"],
    "padded text": CASES["padded text"],
    "one stream on itself": CASES["one stream on itself"],
    "block only": CASES["block only"],
}


@pytest.mark.parametrize("images", [1, B])
@pytest.mark.parametrize("name", SPLASH)
def test_splash_kernel_equals_the_dense_mask(name, images):
    found = value_and_gradient("splash_interpret", *SPLASH[name], images=images)
    assert_equal_trees(found, value_and_gradient("reference", *SPLASH[name]))


def test_splash_kernel_on_a_mesh_equals_the_dense_mask():
    mesh = partitioning.make_mesh(2, 1, 2, jax.devices()[:4])
    with partitioning.scope(mesh):
        found = value_and_gradient("splash_interpret", *CASES["padded text"])
    assert_equal_trees(found, value_and_gradient("reference", *CASES["padded text"]))


def test_splash_kernel_computes_no_empty_tile():
    tiles, side = 2, 512  # a block is 2 x 2 tiles of the kernel
    clean = splash.kernel(1, L - 1, True, L - 1, tiles * side, 0, True)
    pred = splash.kernel(1, L, False, L - 1, tiles * side, 0, True)
    assert clean[1:] == ((L - 1) * tiles * side,) * 2
    assert pred[1:] == (L * tiles * side, (2 * L - 1) * tiles * side)
    for (kernel, *_), pairs in ((clean, L * (L - 1) // 2), (pred, L * (L + 1) // 2)):
        for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
            assert np.count_nonzero(info.block_mask) == pairs * tiles**2
            assert info.partial_mask_blocks is None
    with_text, _, columns = splash.kernel(1, L, True, L, side, T, True)
    assert columns == (L + 1) * side
    assert np.count_nonzero(with_text.fwd_mask_info.block_mask) == L * (L + 1) // 2 + L


@pytest.mark.parametrize("topology, accelerator, tokens", [("v5e:4x4", "v5litepod-16", 1), ("v5p:2x2x1", "v5p-8", 40)])
def test_splash_kernel_compiles_for_a_tpu(topology, accelerator, tokens, monkeypatch):
    """Forward and gradient at a quarter of FFHQ-1024's blocks, images and heads split over the chips."""
    pytest.importorskip("libtpu")
    # what libtpu asks a TPU machine for
    for name, value in {
        "ACCELERATOR_TYPE": accelerator,
        "WORKER_HOSTNAMES": "localhost",
        "SKIP_MDS_QUERY": "1",
    }.items():
        monkeypatch.setenv(f"TPU_{name}", value)
    devices = list(topologies.get_topology_desc(topology, "tpu").devices)
    mesh = partitioning.make_mesh(1, -1, 2, devices)

    def abstract(*shape):
        return jax.ShapeDtypeStruct((2 * len(devices), *shape, 18, 64), jnp.bfloat16)

    clean, pred, words = abstract(3, 256), abstract(4, 256), abstract(tokens)
    lengths = jax.ShapeDtypeStruct(words.shape[:1], jnp.int32) if tokens > 1 else None
    streams = [QKV(clean, clean, clean), QKV(pred, pred, pred)]

    def total(streams, words, lengths):
        outputs = attention.block_attention(streams, streams[0].kv, words, lengths, implementation="splash")
        return sum(jnp.sum(x.astype(jnp.float32)) for x in outputs)

    with partitioning.scope(mesh):
        program = jax.jit(jax.grad(total, argnums=(0, 1)), in_shardings=partitioning.batch_sharding(mesh)).lower(
            streams, KV(words, words), lengths
        )
        text = program.compile().as_text()
    padded = "_segmented" if tokens > 1 else ""
    kernels = (f"splash_mha_{kernel}{padded}" for kernel in ("fwd", "dq", "dkv"))
    assert all(f"{kernel}_{kind}residuals" in text for kernel, kind in zip(kernels, ("", "no_", "no_")))


def test_auto_takes_the_kernel_of_the_platform_where_the_shape_allows():
    auto = functools.partial(attention.choose, "auto", head=64)
    assert auto("cpu", "bfloat16", 256) == auto("gpu", "float32", 256) == "blocks"
    assert auto("gpu", "bfloat16", 256) == "cudnn"
    assert auto("tpu", "bfloat16", 256) == auto("tpu", "float32", 128) == "splash"
    assert auto("tpu", "bfloat16", 64) == "blocks"
    assert attention.choose("auto", "gpu", "bfloat16", 256, 12) == "blocks"
    assert attention.choose("blocks", "tpu", "bfloat16", 256, 64) == "blocks"
    assert attention.choose("splash", "cpu", "float32", 64, 64) == "splash_interpret"


@pytest.mark.parametrize("causal", [True, False])
def test_a_single_key_gets_all_the_weight_in_bfloat16_too(causal):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 1, 4, 8), jnp.bfloat16) for i in range(3))

    def attend(*args):
        return attention.attend(*args, causal=causal)

    out, pull = jax.jit(functools.partial(jax.vjp, attend))(q, k, v)
    np.testing.assert_array_equal(out, v)
    for gradient, expected in zip(pull(out), (jnp.zeros_like(q), jnp.zeros_like(k), v), strict=True):
        np.testing.assert_array_equal(gradient, expected)


def test_a_query_sees_earlier_context_blocks_and_itself_only():
    streams = [stream(0, L), stream(1, L)]
    context = streams[0].kv
    before = attention.block_attention(streams, context, None, implementation="blocks")
    changed = KV(*(x.at[:, 2].add(1.0) for x in context))
    after = attention.block_attention(streams, changed, None, implementation="blocks")
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[:, :3], y[:, :3])
        assert float(jnp.abs(x[:, 3] - y[:, 3]).max()) > 1e-3


@pytest.mark.parametrize("implementation, unfilled", [("blocks", jnp.nan), ("cudnn", 100.0)])
def test_the_cache_gives_what_training_gives(implementation, unfilled, no_cudnn):
    streams, words = [stream(0, L), stream(1, L)], text()
    context = streams[0].kv
    whole = attention.block_attention(streams, context, words, implementation="blocks")
    slots = KV(*(x[:, : L - 1].at[:, 2:].set(unfilled) for x in context))

    @jax.jit
    def traced(own, block):
        return attention.cached_attention(own, slots, words, block, implementation=implementation)

    for n, own in enumerate(streams):
        one = QKV(*(x[:, 2:3] for x in own))
        static = attention.cached_attention(one, slots, words, 2, implementation=implementation)
        np.testing.assert_allclose(static[:, 0], whole[n][:, 2], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(traced(one, 2), static, rtol=1e-5, atol=1e-6)
        first = QKV(*(x[:, :1] for x in own))
        np.testing.assert_allclose(traced(first, 0)[:, 0], whole[n][:, 0], rtol=1e-4, atol=1e-5)
