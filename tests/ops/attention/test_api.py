import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from madformer_jax.config.table import FIELDS
from madformer_jax.errors import ConfigError
from madformer_jax.ops.attention import api, cudnn_calls, pallas_tpu, qk_kernels
from madformer_jax.ops.attention.base import KV, QKV, causal_attention
from madformer_jax.ops.attention.pallas import PallasAttention
from madformer_jax.ops.attention.qk_norm_rope import ProjectedQK, apply_to_tree
from madformer_jax.ops.attention.tiling import tiling
from madformer_jax.ops.rope import RotaryTable
from madformer_jax.runtime import partitioning
from tests.support import flash

B, L, S, H, SIZE, T = 2, 4, 3, 2, 8, 5
IMPLEMENTATIONS = api.IMPLEMENTATIONS | {"pallas_interpret": PallasAttention(interpret=True)}


def stream(seed, blocks, tokens=S):
    keys = jax.random.split(jax.random.key(seed), 7)
    q, k, v = (jax.random.normal(k, (B, blocks, tokens, H, SIZE)) for k in keys[:3])
    scales = (1 + 0.3 * jax.random.normal(k, (SIZE,)) for k in keys[3:5])
    position = RotaryTable(*(jax.random.normal(k, (blocks, tokens, SIZE)) for k in keys[5:]))
    # Away from zero, where QK-norm amplifies rounding errors.
    q, k = (ProjectedQK(x + jnp.sign(x), scale, position) for x, scale in zip((q, k), scales, strict=True))
    return QKV(q, k, v)


def text(seed=9):
    return KV(*(jax.random.normal(k, (B, T, H, SIZE)) for k in jax.random.split(jax.random.key(seed))))


LENGTHS = jnp.array([2, 4])  # text tokens of each image; the rest of the T tokens is padding
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


def value_and_gradient(implementation, streams, source, text, lengths=None, *, images=1):
    """Returns outputs and gradients of a sum in which every output has a different weight."""

    def flatten_images(x):
        if isinstance(x, ProjectedQK):
            return x._replace(x=flatten_images(x.x), position=jax.lax.stop_gradient(x.position))
        return x.reshape(B // images, -1, *x.shape[2:])

    def total(streams, text):
        shapes = [stream.v.shape for stream in streams]
        streams = [QKV(*map(flatten_images, stream)) for stream in streams]
        text = text and KV(*map(flatten_images, text))
        context = streams[0].kv if source else None
        outputs = IMPLEMENTATIONS[implementation].block_attention(streams, context, text, lengths, images=images)
        outputs = [x.reshape(shape) for x, shape in zip(outputs, shapes, strict=True)]
        weights = [jnp.cos(jnp.arange(x.size)).reshape(x.shape) for x in outputs]
        return sum(jnp.sum(x * w) for x, w in zip(outputs, weights, strict=True)), outputs

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1) if text else 0, has_aux=True))(streams, text)


@pytest.fixture
def no_cudnn(monkeypatch):
    flash.replace_cudnn(monkeypatch)


def assert_equal_trees(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


@functools.cache
def dense(name):
    """Returns the result of a case with the dense mask, the reference of every implementation."""
    return value_and_gradient("reference", *PALLAS[name])


# The tests of the TPU kernels are below, with tiles of 128 tokens.
@pytest.mark.parametrize("implementation", [x for x in api.IMPLEMENTATIONS if x not in ("reference", "pallas")])
@pytest.mark.parametrize("name", CASES)
def test_every_implementation_equals_the_dense_mask(name, implementation, no_cudnn):
    assert_equal_trees(value_and_gradient(implementation, *CASES[name]), dense(name))


def test_a_gpu_with_kernels_for_queries_and_keys_equals_the_dense_mask_on_a_mesh(no_cudnn, monkeypatch):
    """The kernels take larger heads and blocks than those above, and split images and heads over devices."""
    monkeypatch.setattr(qk_kernels, "INTERPRET", True)
    monkeypatch.setitem(globals(), "SIZE", 32)
    bias = jax.random.normal(jax.random.key(9), (H, 32))
    streams = [
        QKV(y.q._replace(bias=n * bias), y.k._replace(bias=bias), y.v)
        for n, y in enumerate((stream(0, L - 1, 16), stream(1, L, 16)))
    ]
    assert all(qk_kernels.supports(x) for y in streams for x in (y.q, y.k))
    expected = value_and_gradient("reference", streams, "clean", None)
    with partitioning.scope(partitioning.make_mesh(2, 1, 2, jax.devices()[:4])):
        assert_equal_trees(value_and_gradient("cudnn", streams, "clean", None), expected)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 8, 11, 16])
def test_tiles_cover_every_pair_of_blocks_once(blocks):
    count = np.zeros((blocks, blocks), int)
    number = jnp.arange(blocks)[None, :, None]
    for tile in tiling(blocks):
        for rows, keys in zip(tile.queries(number), tile.keys(number), strict=True):
            count[np.ix_(rows, keys)] += 1
    np.testing.assert_array_equal(count, np.tri(blocks, k=-1))


def to_cache(kv, implementation):
    """Returns a cache of two layers, the second of which holds `kv`."""
    return IMPLEMENTATIONS[implementation].to_cache_layout(KV(*(jnp.stack([x + 1, x]) for x in kv)))


WITH_CACHE = [x for x in IMPLEMENTATIONS if x != "pallas"]


@pytest.mark.parametrize("implementation", WITH_CACHE)
def test_padding_changes_nothing(implementation, no_cudnn):
    """Padding changes no output and no gradient, and gets no gradient, with the cache as well."""
    streams, source, words, lengths = CASES["padded text"]
    padding = (np.arange(T) >= lengths[:, None])[..., None, None]
    others = KV(*(jnp.where(padding, x + 3, x) for x in words))
    expected, actual = (value_and_gradient(implementation, streams, source, x, lengths) for x in (words, others))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    for gradient in expected[1][1]:
        assert not np.where(padding, gradient, 0).any() and (gradient[:, 0] != 0).all()
    if implementation != "reference":
        qkv = QKV(*(x[:, 2:3] for x in apply_to_tree(streams[1])))

        def read(words):
            context, words = (to_cache(kv, implementation) for kv in (apply_to_tree(streams[0].kv), words))
            return IMPLEMENTATIONS[implementation].cached_attention(qkv, context, words, 1, 2, lengths)

        cached = read(words)
        np.testing.assert_array_equal(cached, read(others))
        np.testing.assert_allclose(cached[:, 0], expected[0][1][1][:, 2], rtol=1e-4, atol=1e-5)


LARGE = 256  # tokens of a block of two tiles, since the tests use tiles of 128


def padded(kv):
    """Pads the text to two tiles of the kernel."""
    return KV(*(jnp.pad(x, ((0, 0), (0, 130), (0, 0), (0, 0)), constant_values=0.5) for x in kv))


PALLAS = CASES | {
    "two tiles a block, text": ([stream(0, L - 1, LARGE), stream(1, L, LARGE)], "clean", padded(text()), LENGTHS + 127),
    "two tiles a block, no context": ([stream(0, L, LARGE)], None, None),
}


# Several images in a row contain the case of one, except for the shapes.
@pytest.mark.parametrize("name, images", [*((name, B) for name in PALLAS), ("both streams", 1), ("padded text", 1)])
def test_tpu_kernels_equal_the_dense_mask(name, images, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "tile_size", lambda tokens: 128 if tokens % 128 == 0 else None)
    assert_equal_trees(value_and_gradient("pallas_interpret", *PALLAS[name], images=images), dense(name))


def test_tpu_kernels_equal_full_attention():
    """The U-Net runs them on plain queries and keys, with several images in a row."""
    q, k, v = (
        jnp.asarray(rng.normal(size=(B, 256, H, 8)), jnp.float32) for rng in map(np.random.default_rng, range(3))
    )

    def run(implementation):
        def total(*args):
            return (IMPLEMENTATIONS[implementation].attend(*args) ** 2).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)

    assert_equal_trees(run("pallas_interpret"), run("blocks"))


def test_tpu_kernels_on_a_mesh_equal_the_dense_mask():
    mesh = partitioning.make_mesh(2, 1, 2, jax.devices()[:4])
    with partitioning.scope(mesh):
        actual = value_and_gradient("pallas_interpret", *CASES["padded text"])
    assert_equal_trees(actual, dense("padded text"))


def test_tpu_kernels_neither_compute_nor_count_hidden_tiles():
    streams = [stream(0, L - 1, 128), stream(1, L, 128)]
    clean = streams[0]
    # Only the last query block attends to context block 2.
    hidden = KV(clean.k._replace(x=clean.k.x.at[:, 2].set(jnp.nan)), clean.v.at[:, 2].set(jnp.nan))
    attend = PallasAttention(interpret=True).block_attention
    out = attend(streams[1:], hidden, None)[0]
    assert jnp.isfinite(out[:, :3]).all() and jnp.isnan(out[:, 3]).all()

    def estimated_flops(streams, context, words):
        program = str(jax.make_jaxpr(lambda: attend(streams, context, words))())
        return int(re.search(r"CostEstimate\(flops=(\d+)", program)[1])

    tile = B * H * 2 * 2 * SIZE * 128**2
    assert estimated_flops(streams[1:], streams[0].kv, None) == tile * L * (L + 1) // 2
    few = 16  # sublanes of a register, which hold the 5 tokens of the text
    assert estimated_flops(streams[1:], streams[0].kv, text()) == tile * L * (L + 1) // 2 + tile * L * few // 128
    assert estimated_flops(streams[:1], streams[0].kv, None) == tile * L * (L - 1) // 2
    assert estimated_flops(streams[1:], None, None) == tile * L


@pytest.mark.parametrize("topology, accelerator, tokens", [("v5e:4x4", "v5litepod-16", 1), ("v5p:2x2x1", "v5p-8", 40)])
def test_tpu_kernels_compile_for_a_tpu(topology, accelerator, tokens, monkeypatch):
    """Compiles 4 of the 16 blocks of FFHQ-1024, with images and heads split over the chips."""
    pytest.importorskip("libtpu")
    # libtpu otherwise queries the metadata server of a TPU machine.
    for name, value in {
        "ACCELERATOR_TYPE": accelerator,
        "WORKER_HOSTNAMES": "localhost",
        "SKIP_MDS_QUERY": "1",
    }.items():
        monkeypatch.setenv(f"TPU_{name}", value)
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another worker of pytest may hold it
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
        outputs = PallasAttention().block_attention(streams, streams[0].kv, words, lengths)
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


def test_auto_selects_the_kernel_of_the_platform_if_the_shape_allows():
    def auto(*case):
        return api.choose("auto", *case).name

    assert auto("cpu", "bfloat16", 64, 256) == auto("gpu", "float32", 64, 256) == "blocks"
    assert auto("gpu", "bfloat16", 64, 256) == "cudnn"
    assert auto("tpu", "bfloat16", 64, 256) == auto("tpu", "float32", 64, 128) == "pallas"
    assert auto("tpu", "bfloat16", 64, 64) == auto("gpu", "bfloat16", 12, 256) == "blocks"
    assert api.choose("blocks", "tpu", "bfloat16", 64, 256).name == "blocks"
    assert api.choose("pallas", "tpu", "bfloat16", 64, 256) == PallasAttention()
    assert api.choose("pallas", "cpu", "float32", 64, 64) == PallasAttention(interpret=True)
    for name, case, words in (
        ("pallas", ("tpu", "bfloat16", 64, 64), "a multiple of 128 tokens, but the model has blocks of 64"),
        ("cudnn", ("cpu", "bfloat16", 64, 64), "needs an NVIDIA GPU.* on cpu"),
        ("cudnn", ("gpu", "bfloat16", 12, 64), "at most 128.* heads of 12"),
    ):
        with pytest.raises(ConfigError, match=words):
            api.choose(name, *case)


def test_the_choices_of_the_config_are_the_implementations():
    assert set(FIELDS["model.attention"].choices) == {"auto", *api.IMPLEMENTATIONS}
    assert all(implementation.name == name for name, implementation in api.IMPLEMENTATIONS.items())


@pytest.mark.parametrize("change", ["missing", "another argument", "another result"])
def test_a_jax_with_other_private_functions_runs_without_cudnn_and_says_so_once(change, monkeypatch, caplog):
    functions = cudnn_calls.private_functions()

    def changed():
        if change == "missing":
            raise AttributeError("no attribute '_dot_product_attention_bwd_p_wrapper'")
        if change == "another argument":
            return functions._replace(forward=lambda q, k, v, *, lengths: None)
        return functions._replace(backward=lambda *args, **settings: ())

    monkeypatch.setattr(cudnn_calls, "private_functions", changed)
    cudnn_calls.is_available.cache_clear()
    try:
        for _ in range(2):
            assert api.choose("auto", "gpu", "bfloat16", 64, 256).name == "blocks"
        with pytest.raises(ConfigError, match="config.model.attention='cudnn' needs"):
            api.choose("cudnn", "gpu", "bfloat16", 64, 256)
        (record,) = caplog.records
        assert "runs without cuDNN" in record.getMessage() and jax.__version__ in record.getMessage()
    finally:
        cudnn_calls.is_available.cache_clear()


@pytest.mark.parametrize("causal", [True, False])
def test_a_single_key_gets_all_the_weight_in_bfloat16_too(causal):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 1, 4, 8), jnp.bfloat16) for i in range(3))

    def attend(*args):
        return causal_attention(*args) if causal else api.IMPLEMENTATIONS["blocks"].attend(*args)

    out, vjp = jax.jit(functools.partial(jax.vjp, attend))(q, k, v)
    np.testing.assert_array_equal(out, v)
    for gradient, expected in zip(vjp(out), (jnp.zeros_like(q), jnp.zeros_like(k), v), strict=True):
        np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("implementation", WITH_CACHE)
def test_attention_with_the_cache_equals_training(implementation, no_cudnn):
    unfilled = 100.0 if implementation == "cudnn" else jnp.nan
    streams, words = [stream(0, L), stream(1, L)], text()
    context = streams[0].kv
    attention = IMPLEMENTATIONS[implementation]
    expected = IMPLEMENTATIONS["blocks"].block_attention(streams, context, words)
    lengths = attention.cache_lengths(None, jnp.zeros((B, T), int))
    words = to_cache(words, implementation)
    slots = to_cache(KV(*(x[:, : L - 1].at[:, 2:].set(unfilled) for x in apply_to_tree(context))), implementation)
    one_block = attention.cached_attention

    @jax.jit
    def traced(qkv, layer, block):
        return one_block(qkv, slots, words, layer, block, lengths)

    for n, qkv in enumerate(apply_to_tree(streams)):
        third = QKV(*(x[:, 2:3] for x in qkv))
        static = one_block(third, slots, words, 1, 2, lengths)
        np.testing.assert_allclose(static[:, 0], expected[n][:, 2], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(traced(third, 1, 2), static, rtol=1e-5, atol=1e-6)
        first = QKV(*(x[:, :1] for x in qkv))
        np.testing.assert_allclose(traced(first, 1, 0)[:, 0], expected[n][:, 0], rtol=1e-4, atol=1e-5)


def test_a_query_sees_earlier_context_blocks_and_itself_only():
    streams = [stream(0, L), stream(1, L)]
    context = streams[0].kv
    blocks = api.IMPLEMENTATIONS["blocks"]
    before = blocks.block_attention(streams, context, None)
    changed = KV(context.k._replace(x=context.k.x.at[:, 2].add(1.0)), context.v.at[:, 2].add(1.0))
    after = blocks.block_attention(streams, changed, None)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[:, :3], y[:, :3])
        assert float(jnp.abs(x[:, 3] - y[:, 3]).max()) > 1e-3
