"""Pallas splash attention on TPU: the kernel of a skip-causal mask, and what runs it on each device's own share."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import PartitionSpec

from madformer_jax.runtime import partitioning

KEPT = "attention"  # name of the kernel's output and sums in a policy of jax.checkpoint


def without_padding(kernel: Any, q: Array, k: Array, v: Array, ids: Array) -> Array:
    """The kernel where `ids` (columns,) are 1 at keys that are seen, and 0 at padding."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    return kernel(q, k, v, segment_ids=SegmentIds(jnp.ones(q.shape[1], ids.dtype), ids))


def on_each_device(function: Callable[..., Array], *args: Array) -> Array:
    """Runs a function of arrays (B, H, ...) on each device's own images and heads: the compiler cannot split a kernel.

    Arrays of fewer dimensions than the first have no heads. Images or heads that their mesh axes do not divide are not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*args)
    spec = nn.logical_to_mesh_axes(("batch", "heads"))
    axes = [(axis,) if isinstance(axis, str) else axis or () for axis in spec or ((), ())]
    sizes = [math.prod(mesh.shape[name] for name in names) for names in axes]
    spec = PartitionSpec(*(names if size % n == 0 else None for names, size, n in zip(axes, args[0].shape, sizes)))
    specs = tuple(spec if x.ndim == args[0].ndim else PartitionSpec(spec[0]) for x in args)
    return jax.shard_map(function, in_specs=specs, out_specs=spec, check_vma=False)(*args)


def images_in_a_row(batch: int) -> int:
    """How many images of a batch stand one after the other in one row of tokens: all of a device's.

    A kernel's gradient sums over the tokens of all images, and a TPU copies them into a row where they are not in one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else partitioning.batch_devices(mesh)
    return batch // parts if batch % parts == 0 else batch


def laid_out(x: Array, interpret: bool) -> Array:
    """X, and its gradient, in memory in the order of its axes; on a TPU, where the compiler's own choice costs copies."""
    if interpret:
        return x
    from jax.experimental.layout import Layout, with_layout_constraint

    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def tile(tokens: int) -> int | None:
    """Side of the kernel's square tiles of which a block of `tokens` tokens consists; None where no size fits."""
    return next((side for side in (512, 256, 128) if tokens % side == 0), None)


@functools.lru_cache
def kernel(
    images: int, blocks: int, inside: bool, context: int, tokens: int, text: int, interpret: bool
) -> tuple[Any, int, int]:
    """The kernel for q, k, v (H, rows or columns, h), and its numbers of rows and columns; see `attention._splash` for the order.

    blocks, context, text: of each of the `images`, which do not see each other. The tiles that the mask leaves empty are not
    computed; where blocks consist of whole tiles, only the text's need a mask.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as pallas
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

    i, j = np.arange(blocks)[:, None], np.arange(context)
    own = np.zeros((blocks, 0), bool) if inside else np.eye(blocks, dtype=bool)
    parts = [
        np.kron(np.eye(images, dtype=bool), part) for part in (i >= j if inside else i > j, own, np.ones_like(i, bool))
    ]
    visible = np.pad(np.concatenate(parts, axis=1), ((0, 0), (0, 1)))  # of blocks, of each image's text, of padding
    row_of = np.arange(images * blocks).repeat(tokens)
    column_of = np.arange(visible.shape[1]).repeat([tokens] * (visible.shape[1] - images - 1) + [text] * images + [0])
    side = tile(tokens) or 128
    rows, columns = (side * math.ceil(len(of) / side) for of in (row_of, column_of))
    row_of = np.pad(row_of, (0, rows - len(row_of)), mode="edge")  # a row with nothing to see would be NaN
    column_of = np.pad(column_of, (0, columns - len(column_of)), constant_values=visible.shape[1] - 1)

    class Mask(masks.Mask):
        """Of tokens, made tile by tile: whole, it would be the square of the images in memory."""

        shape = rows, columns

        def __getitem__(self, at: tuple[slice, slice]) -> np.ndarray:
            return visible[np.ix_(row_of[at[0]], column_of[at[1]])]

    # what make_splash_mha does, but in NumPy: its arrays would belong to one trace, and the mask takes a second to read
    whole = masks.MultiHeadMask([Mask()])  # for all heads
    forward, backward = (
        process(whole, (side, side), head_shards=1, q_seq_shards=1)[0]
        for process in (mask_info.process_mask, mask_info.process_mask_dkv)
    )
    tokens_last = pallas.QKVLayout.SEQ_MINOR
    sizes = pallas.BlockSizes(
        block_q=side,
        block_kv=side,
        block_q_dkv=side,
        block_kv_dkv=side,
        block_q_dq=side,
        block_kv_dq=side,
        q_layout=tokens_last,
        k_layout=tokens_last,
        v_layout=tokens_last,
    )
    found = pallas.SplashAttentionKernel(
        forward,
        forward,
        backward,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=pallas.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=KEPT,
        mask_function=None,
        interpret=interpret,
    )
    return found, rows, columns
