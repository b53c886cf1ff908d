"""Skip-causal attention on a TPU (section 3.2): calls of the Pallas kernels.

`attention.pallas` calls `block_attention` in training and `cached_attention` in sampling. The kernels
themselves are in `attention.pallas_tpu_kernels`.

Queries, keys and values have their tokens along the last axis, `(B, H, h, tokens)`. Registers of a
TPU have 128 lanes and would be half empty with heads of 64 along them. A row of tokens holds one or
more images. A step of a kernel holds a tile of queries of one head and all keys that they may see
in VMEM. It loops over the tiles of keys that they do see, so nothing else is computed.

Shapes: B rows of `images` images, L blocks, H heads, h head size, T text tokens.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int, PyTree, Shaped

from madformer_jax.ops.attention import pallas_tpu_kernels
from madformer_jax.ops.attention.base import checkpoint_residual
from madformer_jax.ops.attention.pallas_tpu_kernels import LANES, Index, KeyValuePair
from madformer_jax.ops.attention.qk_norm_rope import Projectable, ProjectedQK, is_projected
from madformer_jax.runtime import partitioning

_Shaped = Array | jax.ShapeDtypeStruct
_DEFAULT_VMEM_BYTES = 16 * 2**20  # VMEM that a kernel may use by default


class KernelSizes(NamedTuple):
    """Sizes of the arrays of a kernel, and whether Pallas' interpreter runs it, on any platform."""

    images: int  # in a row
    tokens: int  # of a block, a multiple of 128
    text_tokens: int  # before padding to T; padding is not computed
    interpret: bool


def tile_size(tokens: int) -> int | None:
    """Returns the side of the kernel's square tiles for blocks of `tokens` tokens.

    Returns None if no tile size divides the block.
    """
    return next((side for side in (256, LANES) if tokens % side == 0), None)


def images_per_row(batch: int) -> int:
    """Returns how many images of a batch share a row of tokens: all images of a device.

    The gradient of a dense layer's kernel sums over the tokens of all images. A TPU would copy them
    into one row first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else partitioning.batch_devices(mesh)
    return batch // devices if batch % devices == 0 else batch


def with_row_major_layout(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Stores `x` and its gradient in row-major order.

    The layout that the compiler would choose costs copies.
    """
    from jax.experimental.layout import Layout, with_layout_constraint

    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def pad_text_to_lanes(text: Float[Array, "*rows h _"], images: int) -> Float[Array, "*rows h _"]:
    """Pads text keys or values so that T of each image is a multiple of 128."""
    x = text.reshape(*text.shape[:-1], images, -1)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)]).reshape(*text.shape[:-1], -1)


def shard_map_kernel(
    function: Callable[..., Array], q: Projectable, *args: PyTree[Array]
) -> Float[Array, "B H h columns"]:
    """Runs a function on each device's own images and heads.

    The compiler cannot split a kernel over devices. Batch or heads are not split if their mesh axes
    do not divide them.

    Args:
      function: Function of `q` and `args` that returns an array like `q`.
      q: Queries, `(B, H, ...)` of four axes, or a `ProjectedQK` of them.
      *args: Trees of arrays. Arrays of four axes are split as `q`. Those of five axes have a leading
        axis of layers, and those of one axis have a batch only. Scalars and arrays of two axes are
        replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(q, *args)
    batch, heads = partitioning.batch_and_head_axes(mesh, *jax.tree.leaves(q)[0].shape[:2])
    specs = {0: (), 1: (batch,), 2: (), 4: (batch, heads), 5: (None, batch, heads)}
    in_specs = jax.tree.map(lambda x: PartitionSpec(*specs[jnp.ndim(x)]), (q, *args))
    return jax.shard_map(function, in_specs=in_specs, out_specs=PartitionSpec(*specs[4]), check_vma=False)(q, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def block_attention(
    q: ProjectedQK | Float[Array, "B H h columns"],
    self_kv: KeyValuePair | None,
    context: KeyValuePair | None,
    text: KeyValuePair | None,
    lengths: Int[Array, " rows"] | None,
    sizes: KernelSizes,
) -> Float[Array, "B H h columns"]:
    """Computes attention of all blocks of a stream, in training.

    Args:
      q: Queries, `(B, H, h, images * L * tokens)`. Queries and keys are all projections or all
        arrays.
      self_kv: Keys and values of the stream, like `q`. None if the context holds them.
      context: Keys and values, like `q`, or None. Query block i attends to its blocks j < i, or
        j <= i without `self_kv`.
      text: Keys and values, arrays `(B, H, h, images * T)` with T a multiple of 128, or None.
      lengths: Visible text tokens of each image, `(B * images,)`. None without text.
      sizes: The sizes.

    Returns:
      The output, shaped like the array of `q`.
    """
    return _forward_with_residuals(q, self_kv, context, text, lengths, sizes)[0]


def cached_attention(
    q: Float[Array, "B H h tokens"],
    self_kv: KeyValuePair,
    context: KeyValuePair | None,
    text: KeyValuePair | None,
    lengths: Int[Array, " B"] | None,
    layer: int | Int[Array, ""],
    block: int | Int[Array, ""],
    interpret: bool,
) -> Float[Array, "B H h tokens"]:
    """Computes attention of one block against the cache, in sampling.

    Args:
      q: Queries of the block.
      self_kv: Keys and values of the block, like `q`.
      context: Cached keys and values, each `(layers, B, H, h, slots * tokens)`, or None. Slots from
        `block` on are ignored but must be finite.
      text: Cached keys and values, each `(layers, B, H, h, T)` with T a multiple of 128, or None.
      lengths: Visible text tokens of each image. None without text.
      layer: Index of the layer in the cache.
      block: Number of filled slots.
      interpret: Whether to run the kernel in Pallas' interpreter, on any platform.
    """
    tokens = q.shape[3]
    mean_blocks = 0 if context is None else context[0].shape[4] / tokens / 2
    scalars = _scalar_arguments(layer, block, lengths, len(q))
    sizes = KernelSizes(1, tokens, 0 if text is None else text[0].shape[-1], interpret)
    return _forward(q, _keys_by_kind(self_kv, context, text), scalars, mean_blocks, sizes)[0]


def _forward(
    q: Projectable,
    keys: dict[str, KeyValuePair],
    scalars: Int[Array, " scalars"],
    mean_blocks: float,
    sizes: KernelSizes,
) -> tuple[Float[Array, "B H h queries"], Float[Array, "B H 1 queries"]]:
    """Returns the output and the base-2 log-sum-exp."""
    x = _raw_array(q)
    lse = jax.ShapeDtypeStruct((*x.shape[:2], 1, x.shape[3]), jnp.float32)
    results = jax.ShapeDtypeStruct(x.shape, x.dtype), lse
    return _call_kernel(pallas_tpu_kernels.forward, scalars, (q, keys), results, 2, mean_blocks, sizes)


def _forward_with_residuals(
    q: ProjectedQK | Array,
    self_kv: KeyValuePair | None,
    context: KeyValuePair | None,
    text: KeyValuePair | None,
    lengths: Array | None,
    sizes: KernelSizes,
) -> tuple[Array, PyTree]:
    keys = _keys_by_kind(self_kv, context, text)
    scalars = _scalar_arguments(0, 0, lengths, len(_raw_array(q)) * sizes.images)
    out, lse = _forward(q, keys, scalars, _mean_context_blocks(_raw_array(q), self_kv, sizes), sizes)
    out, lse = checkpoint_residual(out), checkpoint_residual(lse)
    return out, (q, keys, scalars, out, lse)


def _mean_context_blocks(q: _Shaped, self_kv: KeyValuePair | None, sizes: KernelSizes) -> float:
    """Returns the mean number of context blocks that a block attends to in training."""
    return (q.shape[3] // sizes.images // sizes.tokens - 1) / 2 + (self_kv is None)


def _backward(sizes: KernelSizes, saved: PyTree, d_out: Float[Array, "B H h columns"]) -> tuple[PyTree, ...]:
    q, keys, scalars, out, lse = saved
    arrays = jax.tree.map(_raw_array, (q, keys), is_leaf=is_projected)
    dq, d_keys = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    projected = sorted(kind for kind, (k, _) in keys.items() if is_projected(k))
    scale_count, lanes = 1 + len(projected), math.gcd(tile_size(sizes.tokens) or sizes.tokens, LANES)
    if is_projected(q):
        d_keys["scales"] = jax.ShapeDtypeStruct((*dq.shape[:3], sizes.images * scale_count * lanes), jnp.float32)
    mean_blocks = _mean_context_blocks(dq, keys.get("self"), sizes)
    inputs = q, keys, out, d_out, lse
    dq, d_keys = _call_kernel(pallas_tpu_kernels.backward, scalars, inputs, (dq, d_keys), 5, mean_blocks, sizes)
    if is_projected(q):
        d_scales = d_keys["scales"].reshape(*dq.shape[:3], sizes.images, scale_count, lanes).sum((0, 1, 3, 5))

        def gradient(index: int, dx: Array) -> ProjectedQK:
            return ProjectedQK(dx, d_scales[:, index, None].astype(q.scale.dtype), None)  # type: ignore[arg-type]  # no gradient

        dq = gradient(0, dq)
        for index, kind in enumerate(projected, 1):
            dk, dv = d_keys[kind]
            d_keys[kind] = gradient(index, dk), dv
    return dq, *(d_keys.get(kind) for kind in ("self", "context", "text")), None


def _raw_array(x: PyTree) -> _Shaped:
    return x.x if is_projected(x) else x


block_attention.defvjp(_forward_with_residuals, _backward)


def _keys_by_kind(
    self_kv: KeyValuePair | None, context: KeyValuePair | None, text: KeyValuePair | None
) -> dict[str, KeyValuePair]:
    """Returns the keys and values that are not None, by their kind."""
    pairs = {"self": self_kv, "context": context, "text": text}
    return {kind: tuple(pair) for kind, pair in pairs.items() if pair is not None}


def _scalar_arguments(
    layer: int | Int[Array, ""], block: int | Int[Array, ""], lengths: Int[Array, " images"] | None, images: int
) -> Int[Array, " 2+{images}"]:
    """Returns the scalar arguments of a kernel, as `pallas_tpu_kernels._key_sources` reads them."""
    lengths = jnp.zeros(images, jnp.int32) if lengths is None else lengths
    return jnp.concatenate([jnp.stack([jnp.asarray(x, jnp.int32) for x in (layer, block)]), lengths.astype(jnp.int32)])


def _call_kernel(
    kernel: Callable[..., None],
    scalars: Int[Array, " scalars"],
    inputs: tuple[PyTree[Array], ...],
    results: tuple[PyTree[jax.ShapeDtypeStruct], ...],
    products: int,
    mean_blocks: float,
    sizes: KernelSizes,
) -> PyTree[Array]:
    """Runs a kernel on the grid of rows, images, heads and tiles of queries.

    Args:
      kernel: Function of `pallas_tpu_kernels`.
      scalars: Result of `_scalar_arguments`.
      inputs: Inputs of the kernel. The second is the dictionary of keys and values by kind. All
        others belong to queries.
      results: Shapes of the results. A dictionary holds those of keys and values by kind.
      products: Matrix products of each pair of a query and a visible key, for the cost estimate.
      mean_blocks: Mean number of context blocks that a block attends to, for the cost estimate.
      sizes: The sizes.
    """
    images, tokens, text_tokens, interpret = sizes
    keys: dict[str, KeyValuePair] = inputs[1]
    batch, heads, size, columns = _raw_array(inputs[0]).shape
    side = tile_size(tokens) or tokens  # other sizes run in the interpreter only

    def image_width(x: _Shaped) -> int:
        """Returns the columns of one image in an array.

        Rotary tables are the same for all images.
        """
        return x.shape[-1] // (images if len(x.shape) > 2 else 1)

    def window_width(kind: str, x: _Shaped) -> int:
        """Returns the columns of an array that a step holds.

        These are a tile of queries, the keys of their block, or all keys of the image or its text.
        """
        return min({"query": side, "self": tokens}.get(kind, image_width(x)), image_width(x))

    def spec(kind: str, x: _Shaped) -> pl.BlockSpec:
        count = image_width(x) // window_width(kind, x)

        def index_map(row: Array, image: Array, head: Array, step: Array, scalars: Ref) -> tuple[Index, ...]:
            column = {"query": step, "self": jax.lax.div(step, tokens // side)}.get(kind, 0) if count > 1 else 0
            if len(x.shape) == 2:
                return 0, column
            return (*([scalars[0]] if len(x.shape) == 5 else []), row, head, 0, image * count + column)

        return pl.BlockSpec((*[None] * (len(x.shape) - 2), x.shape[-2], window_width(kind, x)), index_map)

    def map_with_kind(function: Callable[[str, Array | jax.ShapeDtypeStruct], object], tree: PyTree) -> PyTree:
        by_kind = tree if isinstance(tree, dict) else {"query": tree}
        mapped = {kind: jax.tree.map(functools.partial(function, kind), subtree) for kind, subtree in by_kind.items()}
        return mapped if isinstance(tree, dict) else mapped["query"]

    widths = {kind: window_width(kind, v) for kind, (_, v) in keys.items()}
    text_tile = pallas_tpu_kernels.text_tile_size(text_tokens)
    visible = {"context": mean_blocks * tokens, "text": -(-text_tokens // text_tile) * text_tile if text_tokens else 0}
    pairs = batch * heads * columns * sum(visible.get(kind, n) for kind, n in widths.items())
    scratch: list[PyTree] = [
        {kind: tpu.VMEM((size, widths[kind]), k.x.dtype) for kind, (k, _) in keys.items() if is_projected(k)}
    ]
    if kernel is pallas_tpu_kernels.backward:
        scratch.append({kind: (tpu.VMEM((size, n), jnp.float32),) * 2 for kind, n in widths.items()})

    def nbytes(kind: str, x: _Shaped) -> int:
        return x.shape[-2] * window_width(kind, x) * x.dtype.itemsize

    # The arrays of two steps, 4 MiB for the temporaries of a tile, and the scratch memory.
    vmem_bytes = 2 * sum(sum(jax.tree.leaves(map_with_kind(nbytes, tree))) for tree in (*inputs, *results)) + 4 * 2**20
    vmem_bytes += sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(scratch))
    return pl.pallas_call(
        functools.partial(kernel, tokens=tokens, text_tokens=text_tokens),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, images, heads, columns // images // side),
            in_specs=[map_with_kind(spec, tree) for tree in inputs],
            out_specs=[map_with_kind(spec, tree) for tree in results],
            scratch_shapes=scratch,
        ),
        out_shape=list(results),
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=max(vmem_bytes, _DEFAULT_VMEM_BYTES),
        ),
        cost_estimate=pl.CostEstimate(
            flops=round(2 * products * size * pairs),
            transcendentals=round(pairs),
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((inputs, results))),
        ),
        interpret=interpret,
        name=f"block_attention_{kernel.__name__}",
    )(scalars, *inputs)
