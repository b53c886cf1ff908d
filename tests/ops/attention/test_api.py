import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from madformer_jax.errors import ConfigError
from madformer_jax.ops.attention import api, cudnn, pallas_tpu
from madformer_jax.ops.attention.api import KV, QKV
from madformer_jax.ops.attention.qk_norm_rope import ProjectedQK, apply_to_tree
from madformer_jax.ops.attention.tiling import tiling
from madformer_jax.ops.rope import RotaryTable
from madformer_jax.runtime import partitioning

B, L, S, H, SIZE, T = 2, 4, 3, 2, 8, 5


def stream(seed, blocks, tokens=S):
    keys = jax.random.split(jax.random.key(seed), 7)
    q, k, v = (jax.random.normal(k, (B, blocks, tokens, H, SIZE)) for k in keys[:3])
    scales = (1 + 0.3 * jax.random.normal(k, (SIZE,)) for k in keys[3:5])
    position = RotaryTable(*(jax.random.normal(k, (blocks, tokens, SIZE)) for k in keys[5:]))
    # away from zero, where QK-norm makes much of each rounding
    q, k = (ProjectedQK(x + jnp.sign(x), scale, position) for x, scale in zip((q, k), scales, strict=True))
    return QKV(q, k, v)


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

    def in_a_row(x):
        if isinstance(x, ProjectedQK):
            return ProjectedQK(in_a_row(x.x), x.scale, jax.lax.stop_gradient(x.position))
        return x.reshape(B // images, -1, *x.shape[2:])

    def total(streams, words):
        given = [stream.v.shape for stream in streams]
        streams = [QKV(*map(in_a_row, stream)) for stream in streams]
        words = words and KV(*map(in_a_row, words))
        context = streams[0].kv if source else None
        outputs = api.block_attention(streams, context, words, lengths, implementation=implementation, images=images)
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
    monkeypatch.setattr(cudnn, "flash_attention", _flash)
    monkeypatch.setattr(cudnn, "flash_attention_backward", _flash_gradient)


def assert_equal_trees(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@functools.cache
def dense(name):
    """A case by the dense mask, which is what every implementation is held against."""
    return value_and_gradient("reference", *PALLAS[name])


@pytest.mark.parametrize("name", CASES)
def test_block_form_equals_the_dense_mask(name):
    assert_equal_trees(value_and_gradient("blocks", *CASES[name]), dense(name))


@pytest.mark.parametrize("name", CASES)
def test_squares_of_cudnn_equal_the_dense_mask(name, no_cudnn):
    assert_equal_trees(value_and_gradient("cudnn", *CASES[name]), dense(name))


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 8, 11, 16])
def test_squares_hold_every_pair_of_blocks_once(blocks):
    seen = np.zeros((blocks, blocks), int)
    number = np.arange(blocks)[None, :, None]
    for square in tiling(blocks):
        for rows, keys in zip(square.queries(number), square.keys(number), strict=True):
            seen[np.ix_(rows, keys)] += 1
    np.testing.assert_array_equal(seen, np.tri(blocks, k=-1))


def kept(kv, implementation):
    """As the second of two layers."""
    return api.to_cache_layout(KV(*(jnp.stack([x + 1, x]) for x in kv)), implementation)


@pytest.mark.parametrize("implementation", ["reference", "blocks", "cudnn", "pallas_interpret"])
def test_padding_moves_nothing_at_all(implementation, no_cudnn):
    """Neither outputs nor gradients, and it gets no gradient; in the cache as in training."""
    streams, source, words, lengths = CASES["padded text"]
    padding = (np.arange(T) >= lengths[:, None])[..., None, None]
    others = KV(*(jnp.where(padding, x + 3, x) for x in words))
    found, other = (value_and_gradient(implementation, streams, source, x, lengths) for x in (words, others))
    jax.tree.map(np.testing.assert_array_equal, found, other)
    for gradient in found[1][1]:
        assert not np.where(padding, gradient, 0).any() and (gradient[:, 0] != 0).all()
    if implementation != "reference":
        own = QKV(*(x[:, 2:3] for x in apply_to_tree(streams[1])))

        def read(words):
            context, words = (kept(kv, implementation) for kv in (apply_to_tree(streams[0].kv), words))
            return api.cached_attention(own, context, words, 1, 2, lengths, implementation=implementation)

        cached = read(words)
        np.testing.assert_array_equal(cached, read(others))
        np.testing.assert_allclose(cached[:, 0], found[0][1][1][:, 2], rtol=1e-4, atol=1e-5)


WHOLE = 256  # tokens of a block that is two tiles of the TPU's kernel, where a tile has 128


def padded(kv):
    """Keys of the text in two tiles of the kernel."""
    return KV(*(jnp.pad(x, ((0, 0), (0, 130), (0, 0), (0, 0)), constant_values=0.5) for x in kv))


PALLAS = CASES | {
    "two tiles a block, text": ([stream(0, L - 1, WHOLE), stream(1, L, WHOLE)], "clean", padded(text()), LENGTHS + 127),
    "two tiles a block, no context": ([stream(0, L, WHOLE)], None, None),
}


@pytest.mark.parametrize("images", [1, B])
@pytest.mark.parametrize("name", PALLAS)
def test_the_tpu_s_kernels_equal_the_dense_mask(name, images, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "tile_size", lambda tokens: 128 if tokens % 128 == 0 else None)
    assert_equal_trees(value_and_gradient("pallas_interpret", *PALLAS[name], images=images), dense(name))


def test_the_tpu_s_kernels_equal_attention_of_all_keys():
    """As in the U-Net: plain queries and keys, several images in a row."""
    q, k, v = (
        jnp.asarray(rng.normal(size=(B, 256, H, 8)), jnp.float32) for rng in map(np.random.default_rng, range(3))
    )

    def run(implementation):
        def total(*args):
            return (api.attend(*args, implementation=implementation) ** 2).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)

    assert_equal_trees(run("pallas_interpret"), run("blocks"))


def test_the_tpu_s_kernels_on_a_mesh_equal_the_dense_mask():
    mesh = partitioning.make_mesh(2, 1, 2, jax.devices()[:4])
    with partitioning.scope(mesh):
        found = value_and_gradient("pallas_interpret", *CASES["padded text"])
    assert_equal_trees(found, dense("padded text"))


def test_the_tpu_s_kernels_compute_and_count_no_tile_that_is_not_seen():
    streams = [stream(0, L - 1, 128), stream(1, L, 128)]
    clean = streams[0]
    unseen = KV(
        clean.k._replace(x=clean.k.x.at[:, 2].set(jnp.nan)), clean.v.at[:, 2].set(jnp.nan)
    )  # by all but the last
    attend = functools.partial(api.block_attention, implementation="pallas_interpret")
    out = attend(streams[1:], unseen, None)[0]
    assert jnp.isfinite(out[:, :3]).all() and jnp.isnan(out[:, 3]).all()

    def counted(streams, context, words):
        program = str(jax.make_jaxpr(lambda: attend(streams, context, words))())
        return int(re.search(r"CostEstimate\(flops=(\d+)", program)[1])

    tile = B * H * 2 * 2 * SIZE * 128**2
    assert counted(streams[1:], streams[0].kv, None) == tile * L * (L + 1) // 2
    few = 16  # rows of a register, for the text's 5 tokens
    assert counted(streams[1:], streams[0].kv, text()) == tile * L * (L + 1) // 2 + tile * L * few // 128
    assert counted(streams[:1], streams[0].kv, None) == tile * L * (L - 1) // 2
    assert counted(streams[1:], None, None) == tile * L


@pytest.mark.parametrize("topology, accelerator, tokens", [("v5e:4x4", "v5litepod-16", 1), ("v5p:2x2x1", "v5p-8", 40)])
def test_the_tpu_s_kernels_compile_for_a_tpu(topology, accelerator, tokens, monkeypatch):
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

    def projected(blocks):
        scale, angles = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64,), (blocks, 256, 64)))
        return ProjectedQK(abstract(blocks, 256), scale, RotaryTable(angles, angles))

    streams, words = [QKV(projected(n), projected(n), abstract(n, 256)) for n in (3, 4)], abstract(tokens)
    lengths = jax.ShapeDtypeStruct(words.shape[:1], jnp.int32) if tokens > 1 else None

    def total(streams, words, lengths):
        outputs = api.block_attention(streams, streams[0].kv, words, lengths, implementation="pallas")
        return sum(jnp.sum(x.astype(jnp.float32)) for x in outputs)

    with partitioning.scope(mesh):
        shardings = jax.tree.map(
            lambda x: (
                partitioning.batch_sharding(mesh) if x.shape[0] == words.shape[0] else partitioning.replicated(mesh)
            ),
            (streams, KV(words, words), lengths),
        )
        program = jax.jit(jax.grad(total, argnums=(0, 1)), in_shardings=shardings)
        text = program.lower(streams, KV(words, words), lengths).compile().as_text()
    assert "block_attention_forward" in text and "block_attention_backward" in text


def test_auto_takes_the_kernel_of_the_platform_where_the_shape_allows():
    auto = functools.partial(api.choose_implementation, "auto", head=64)
    assert auto("cpu", "bfloat16", 256) == auto("gpu", "float32", 256) == "blocks"
    assert auto("gpu", "bfloat16", 256) == "cudnn"
    assert auto("tpu", "bfloat16", 256) == auto("tpu", "float32", 128) == "pallas"
    assert auto("tpu", "bfloat16", 64) == "blocks"
    assert api.choose_implementation("auto", "gpu", "bfloat16", 256, 12) == "blocks"
    assert api.choose_implementation("blocks", "tpu", "bfloat16", 256, 64) == "blocks"
    assert api.choose_implementation("pallas", "cpu", "float32", 64, 64) == "pallas_interpret"
    with pytest.raises(ConfigError, match="a multiple of 128 tokens, but the model has 64"):
        api.choose_implementation("pallas", "tpu", "bfloat16", 64, 64)


@pytest.mark.parametrize("causal", [True, False])
def test_a_single_key_gets_all_the_weight_in_bfloat16_too(causal):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 1, 4, 8), jnp.bfloat16) for i in range(3))

    def attend(*args):
        return api.attend(*args, causal=causal)

    out, pull = jax.jit(functools.partial(jax.vjp, attend))(q, k, v)
    np.testing.assert_array_equal(out, v)
    for gradient, expected in zip(pull(out), (jnp.zeros_like(q), jnp.zeros_like(k), v), strict=True):
        np.testing.assert_array_equal(gradient, expected)


def test_a_query_sees_earlier_context_blocks_and_itself_only():
    streams = [stream(0, L), stream(1, L)]
    context = streams[0].kv
    before = api.block_attention(streams, context, None, implementation="blocks")
    changed = KV(context.k._replace(x=context.k.x.at[:, 2].add(1.0)), context.v.at[:, 2].add(1.0))
    after = api.block_attention(streams, changed, None, implementation="blocks")
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[:, :3], y[:, :3])
        assert float(jnp.abs(x[:, 3] - y[:, 3]).max()) > 1e-3


@pytest.mark.parametrize(
    "implementation, unfilled", [("blocks", jnp.nan), ("cudnn", 100.0), ("pallas_interpret", jnp.nan)]
)
def test_the_cache_gives_what_training_gives(implementation, unfilled, no_cudnn):
    streams, words = [stream(0, L), stream(1, L)], text()
    context = streams[0].kv
    whole = api.block_attention(streams, context, words, implementation="blocks")
    lengths = api.cache_lengths(None, words.k[..., 0, 0], implementation)
    words = kept(words, implementation)
    slots = kept(KV(*(x[:, : L - 1].at[:, 2:].set(unfilled) for x in apply_to_tree(context))), implementation)
    one_block = functools.partial(api.cached_attention, implementation=implementation)

    @jax.jit
    def traced(own, layer, block):
        return one_block(own, slots, words, layer, block, lengths)

    for n, own in enumerate(apply_to_tree(streams)):
        one = QKV(*(x[:, 2:3] for x in own))
        static = one_block(one, slots, words, 1, 2, lengths)
        np.testing.assert_allclose(static[:, 0], whole[n][:, 2], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(traced(one, 1, 2), static, rtol=1e-5, atol=1e-6)
        first = QKV(*(x[:, :1] for x in own))
        np.testing.assert_allclose(traced(first, 1, 0)[:, 0], whole[n][:, 0], rtol=1e-4, atol=1e-5)
