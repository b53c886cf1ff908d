"""Skip-causal attention on a TPU (MADFormer, section 3.2): one kernel for training and sampling, one for the gradient.

Queries, keys and values have their tokens along the last axis, (B, H, h, tokens): a TPU's registers are 128 wide, and half empty with
heads of 64 along them. A step of the kernel has a tile of one head's queries and all keys that they may see in fast memory; it goes
over the tiles of those that they do see, so nothing else is computed. `images` stand one after the other along the tokens.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jax.sharding import PartitionSpec

from madformer_jax.ops.attention import pallas_tpu_kernels
from madformer_jax.ops.attention.pallas_tpu_kernels import LANES, KeyValuePair
from madformer_jax.ops.attention.qk_norm_rope import ProjectedQK, is_projected
from madformer_jax.runtime import partitioning

CHECKPOINT_NAME = "attention"  # name of the kernel's output and sums in a policy of jax.checkpoint
_DEFAULT_VMEM_BYTES = 16 * 2**20  # bytes of fast memory that a kernel may have by default


def tile_size(tokens: int) -> int | None:
    """Side of the kernel's square tiles of which a block of `tokens` tokens consists; None where no size fits."""
    return next((side for side in (256, LANES) if tokens % side == 0), None)


def images_per_row(batch: int) -> int:
    """How many images of a batch stand one after the other in one row of tokens: all of a device's.

    A kernel's gradient sums over the tokens of all images, and a TPU copies them into a row where they are not in one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else partitioning.batch_devices(mesh)
    return batch // parts if batch % parts == 0 else batch


def with_row_major_layout(x: Array) -> Array:
    """X, and its gradient, in memory in the order of its axes, where the compiler's own choice would cost copies."""
    from jax.experimental.layout import Layout, with_layout_constraint

    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def pad_text_to_lanes(text: Array, images: int) -> Array:
    """The text's keys (..., images * T), each image's filled up to whole registers."""
    x = text.reshape(*text.shape[:-1], images, -1)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)]).reshape(*text.shape[:-1], -1)


def shard_map_kernel(function: Callable[..., Array], q: Any, *args: Any) -> Array:
    """Runs a function of arrays (B, H, ...) on each device's own images and heads: the compiler cannot split a kernel.

    Arrays of five axes have those of the layers first; those of one have no heads; those of two, and numbers, are everybody's. Images
    or heads that their mesh axes do not divide are not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(q, *args)
    names = nn.logical_to_mesh_axes(("batch", "heads")) or ((), ())
    axes = [(axis,) if isinstance(axis, str) else axis or () for axis in names]
    sizes = [math.prod(mesh.shape[name] for name in names) for names in axes]
    shape = jax.tree.leaves(q)[0].shape
    batch, heads = (names if size % n == 0 else None for names, size, n in zip(axes, shape, sizes))
    specs = {0: (), 1: (batch,), 2: (), 4: (batch, heads), 5: (None, batch, heads)}
    in_specs = jax.tree.map(lambda x: PartitionSpec(*specs[jnp.ndim(x)]), (q, *args))
    return jax.shard_map(function, in_specs=in_specs, out_specs=PartitionSpec(*specs[4]), check_vma=False)(q, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def block_attention(
    q: ProjectedQK | Array,
    own: KeyValuePair | None,
    context: KeyValuePair | None,
    text: KeyValuePair | None,
    lengths: Array | None,
    images: int,
    tokens: int,
    words: int,
    interpret: bool,
) -> Array:
    """Attention of all blocks of a stream, in training.

    Args:
      q: of (B, H, h, images * blocks * tokens), B rows of `images` images. Where it is an array, so are all keys.
      own: keys and values of the stream, as q; None where the context has them.
      context: keys and values whose blocks j < i query block i sees (j <= i without `own`); None: none.
      text: (B, H, h, images * T), T a multiple of 128, both of them arrays.
      lengths: how many of the T are seen, (B * images,); None without text.
      tokens: of a block; a multiple of 128.
      words: of the T that may be text at all; what fills them up is not computed.

    Returns:
      As the array of q.
    """
    return _forward_with_residuals(q, own, context, text, lengths, images, tokens, words, interpret)[0]


def cached_attention(
    q: Array,
    own: KeyValuePair,
    context: KeyValuePair | None,
    text: KeyValuePair | None,
    lengths: Array | None,
    layer: int | Array,
    block: int | Array,
    interpret: bool,
) -> Array:
    """Attention of one block's queries (B, H, h, tokens) in sampling, with the first `block` slots of the context filled.

    Args:
      own: keys and values of the block, as q.
      context: (layers, B, H, h, slots * tokens), finite where it is not filled, of which the kernel reads layer `layer`.
      text: (layers, B, H, h, T), T a multiple of 128, of which the first `lengths` (B,) are seen.
    """
    tokens = q.shape[3]
    seen = 0 if context is None else context[0].shape[4] / tokens / 2  # on average of all blocks
    numbers = _scalar_arguments(layer, block, lengths, len(q))
    words = 0 if text is None else text[0].shape[-1]
    return _forward(q, _keys_by_kind(own, context, text), numbers, seen, 1, tokens, words, interpret)[0]


def _forward(
    q: Any,
    keys: dict[str, KeyValuePair],
    numbers: Array,
    seen: float,
    images: int,
    tokens: int,
    words: int,
    interpret: bool,
) -> tuple[Array, Array]:
    """The output, as q, and the logarithms of the sums of weights, base 2, (B, H, 1, queries)."""
    x = _raw_array(q)
    sums = jax.ShapeDtypeStruct((*x.shape[:2], 1, x.shape[3]), jnp.float32)
    results = jax.ShapeDtypeStruct(x.shape, x.dtype), sums
    return _call_kernel(
        pallas_tpu_kernels.forward, numbers, (q, keys), results, 2, seen, images, tokens, words, interpret
    )


def _forward_with_residuals(*args: Any) -> tuple[Array, Any]:
    q, own, context, text, lengths, images, tokens, words, interpret = args
    keys = _keys_by_kind(own, context, text)
    numbers = _scalar_arguments(0, 0, lengths, len(_raw_array(q)) * images)
    seen = _mean_context_blocks(_raw_array(q), own, images, tokens)
    out, sums = _forward(q, keys, numbers, seen, images, tokens, words, interpret)
    out, sums = _checkpoint_residual(out), _checkpoint_residual(sums)
    return out, (q, keys, numbers, out, sums)


def _mean_context_blocks(q: Array, own: KeyValuePair | None, images: int, tokens: int) -> float:
    """Context blocks that a block sees in training, on average."""
    return (q.shape[3] // images // tokens - 1) / 2 + (own is None)


def _checkpoint_residual(x: Array) -> Array:
    """X, which a policy keeps by name as whole numbers: of others jax.checkpoint would round a copy."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, CHECKPOINT_NAME), x.dtype)


def _backward(images: int, tokens: int, words: int, interpret: bool, saved: Any, d_out: Array) -> Any:
    q, keys, numbers, out, sums = saved
    arrays = jax.tree.map(_raw_array, (q, keys), is_leaf=is_projected)
    dq, d_keys = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    projected = sorted(kind for kind, (k, _) in keys.items() if is_projected(k))
    places, lanes = 1 + len(projected), math.gcd(tile_size(tokens) or tokens, LANES)
    if is_projected(q):
        d_keys["scales"] = jax.ShapeDtypeStruct((*dq.shape[:3], images * places * lanes), jnp.float32)
    seen = _mean_context_blocks(dq, keys.get("own"), images, tokens)
    given = q, keys, out, d_out, sums
    dq, d_keys = _call_kernel(
        pallas_tpu_kernels.backward, numbers, given, (dq, d_keys), 5, seen, images, tokens, words, interpret
    )
    if is_projected(q):
        d_scales = d_keys["scales"].reshape(*dq.shape[:3], images, places, lanes).sum((0, 1, 3, 5))

        def gradient(place: int, dx: Array) -> ProjectedQK:
            return ProjectedQK(dx, d_scales[:, place, None].astype(q.scale.dtype), None)  # type: ignore[arg-type]  # no gradient

        dq = gradient(0, dq)
        for place, kind in enumerate(projected, 1):
            dk, dv = d_keys[kind]
            d_keys[kind] = gradient(place, dk), dv
    return dq, *(d_keys.get(kind) for kind in ("own", "context", "text")), None


def _raw_array(given: Any) -> Array:
    return given.x if is_projected(given) else given


block_attention.defvjp(_forward_with_residuals, _backward)


def _keys_by_kind(
    own: KeyValuePair | None, context: KeyValuePair | None, text: KeyValuePair | None
) -> dict[str, KeyValuePair]:
    """The keys and values that there are, by their kind."""
    given = {"own": own, "context": context, "text": text}
    return {kind: tuple(pair) for kind, pair in given.items() if pair is not None}


def _scalar_arguments(layer: int | Array, block: int | Array, lengths: Array | None, images: int) -> Array:
    """What the kernel reads as numbers, see `_sources`."""
    lengths = jnp.zeros(images, jnp.int32) if lengths is None else lengths
    return jnp.concatenate([jnp.stack([jnp.asarray(x, jnp.int32) for x in (layer, block)]), lengths.astype(jnp.int32)])


def _call_kernel(
    kernel: Any,
    numbers: Array,
    given: tuple[Any, ...],
    results: tuple[Any, ...],
    products: int,
    seen: float,
    images: int,
    tokens: int,
    words: int,
    interpret: bool,
) -> Any:
    """A kernel on the grid of rows, images, heads and tiles of queries; `products` of each query and key that it sees.

    Dictionaries in `given` and `results` hold keys and values by their kind, all else is of queries. `seen`: context blocks, on
    average.
    """
    keys: dict[str, KeyValuePair] = given[1]
    batch, heads, size, rows = _raw_array(given[0]).shape
    side = tile_size(tokens) or tokens  # which no TPU takes, but its interpreter does

    def whole(x: Any) -> int:
        """Columns that an image has of an array; angles are the same for all images."""
        return x.shape[-1] // (images if len(x.shape) > 2 else 1)

    def width(kind: str, x: Any) -> int:
        """Of what a step has: a tile of queries, the keys of their block, or of the image's all blocks or text."""
        return min({"query": side, "own": tokens}.get(kind, whole(x)), whole(x))

    def spec(kind: str, x: Any) -> pl.BlockSpec:
        count = whole(x) // width(kind, x)

        def at(row: Any, image: Any, head: Any, step: Any, numbers: Any) -> tuple[Any, ...]:
            column = {"query": step, "own": jax.lax.div(step, tokens // side)}.get(kind, 0) if count > 1 else 0
            if len(x.shape) == 2:
                return 0, column
            return (*([numbers[0]] if len(x.shape) == 5 else []), row, head, 0, image * count + column)

        return pl.BlockSpec((*[None] * (len(x.shape) - 2), x.shape[-2], width(kind, x)), at)

    def of_kind(function: Callable[[str, Any], Any], tree: Any) -> Any:
        by_kind = tree if isinstance(tree, dict) else {"query": tree}
        found = {kind: jax.tree.map(functools.partial(function, kind), part) for kind, part in by_kind.items()}
        return found if isinstance(tree, dict) else found["query"]

    widths = {kind: width(kind, v) for kind, (_, v) in keys.items()}
    of_text = pallas_tpu_kernels.text_tile_size(words)
    counted = {"context": seen * tokens, "text": -(-words // of_text) * of_text if words else 0}
    pairs = batch * heads * rows * sum(counted.get(kind, n) for kind, n in widths.items())
    scratch: list[Any] = [
        {kind: tpu.VMEM((size, widths[kind]), k.x.dtype) for kind, (k, _) in keys.items() if is_projected(k)}
    ]
    if kernel is pallas_tpu_kernels.backward:
        scratch.append({kind: (tpu.VMEM((size, n), jnp.float32),) * 2 for kind, n in widths.items()})

    def nbytes(kind: str, x: Any) -> int:
        return x.shape[-2] * width(kind, x) * x.dtype.itemsize

    # two steps' arrays, the sums, and what a tile leaves there
    fast = 2 * sum(sum(jax.tree.leaves(of_kind(nbytes, tree))) for tree in (*given, *results)) + 4 * 2**20
    fast += sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(scratch))
    return pl.pallas_call(
        functools.partial(kernel, tokens=tokens, words=words),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, images, heads, rows // images // side),
            in_specs=[of_kind(spec, tree) for tree in given],
            out_specs=[of_kind(spec, tree) for tree in results],
            scratch_shapes=scratch,
        ),
        out_shape=list(results),
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=max(fast, _DEFAULT_VMEM_BYTES),
        ),
        cost_estimate=pl.CostEstimate(
            flops=round(2 * products * size * pairs),
            transcendentals=round(pairs),
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((given, results))),
        ),
        interpret=interpret,
        name=f"block_attention_{kernel.__name__}",
    )(numbers, *given)
