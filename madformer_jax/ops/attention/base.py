"""Interface of the implementations of skip-causal attention (section 3.2), which is block-causal.

Query block i of either stream attends to the text, to the context blocks before i and to itself.
The context is the clean stream, or the prediction stream if the model has no clean stream. The
visible pairs of blocks are a diagonal and, below it, a triangle that `tiling` cuts into unmasked
attentions. Masked scores are never computed.

`models.transformer` calls `block_attention` in training, and `cached_attention` or
`write_and_attend` in sampling. `models.unet` calls `attend`. To add an implementation, write a subclass of `Attention`, or of
`XlaBlocks` for its sampling, in a file of its own. Add a line to `config.choices.ATTENTION`.

Shapes: B images, L blocks, s tokens a block, H heads, h head size, T text tokens.
"""

import abc
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from madformer_jax.ops.attention.qk_norm_rope import Projectable, apply_to_tree

CHECKPOINT_NAME = "attention"  # name of a kernel's output and lse in policies of jax.checkpoint
Block = Float[Array, "B 1 s H h"]
Blocks = Float[Array, "B L s H h"]
Lengths = Int[Array, " images"] | None  # number of text tokens without padding; None for all
Index = int | Int[Array, ""]  # of a layer or a block; traced or not


class KV(NamedTuple):
    """Keys and values, each `(B, L, s, H, h)` of an image stream or `(B, T, H, h)` of the text."""

    k: Projectable
    v: Array


class QKV(NamedTuple):
    """Queries, keys and values of one stream. q is None if only keys and values are needed."""

    q: Projectable
    k: Projectable
    v: Array

    @property
    def kv(self) -> KV:
        return KV(self.k, self.v)


class Attention(abc.ABC):
    """An implementation of attention.

    Attributes:
      name: Value of `config.model.attention` and word in log lines.
      requirements: Conditions of `supports`, for an error message.
      cache_token_axes: Axes of cached keys and of cached values along which blocks are written, in
        the layout of `to_cache_layout`. Axis 0 is that of the layers.
      unrolls_layers: Whether sampling unrolls its layers. Each layer then has its own cache arrays,
        which no step slices or copies. A block then attends with `write_and_attend`.
      adds_bias: Whether it takes projections without their bias (`ProjectedQK.bias`).
      kernel_platform: "gpu" or "tpu" if it has kernels that `self_check` tries there at start.
    """

    name: ClassVar[str]
    requirements: ClassVar[str] = ""
    cache_token_axes: ClassVar[tuple[int, int]]
    unrolls_layers: ClassVar[bool] = False
    adds_bias: ClassVar[bool] = False
    kernel_platform: ClassVar[str] = ""

    def supports(self, device: str, dtype: str, head_dim: int, tokens: int) -> bool:
        """Returns whether this implementation can run.

        Args:
          device: cpu, gpu or tpu.
          dtype: Name of the type of queries, keys and values.
          head_dim: Head size h.
          tokens: Tokens of a block.
        """
        return True

    def for_device(self, device: str) -> "Attention":
        """Returns the form of this implementation for a device: cpu, gpu or tpu."""
        return self

    def block_attention(
        self, streams: Sequence[QKV], context: KV | None, text: KV | None, lengths: Lengths = None, *, images: int = 1
    ) -> list[Float[Array, "B _ s H h"]]:
        """Computes attention of the image streams in training, all blocks at once.

        Args:
          streams: Queries and keys, each an array or a `ProjectedQK`, and values of each stream,
            `(B, L, s, H, h)`. Streams may have different L.
          context: Keys and values of the same form. Query block i attends to its blocks j < i. None
            lets each block attend to itself only (`diffusion_attention = block`).
          text: Keys and values, each `(B, T, H, h)`, to which every query attends, or None.
          lengths: Number of text tokens without padding of each image. None for all T.
          images: Images in a row (`images_per_row`): arrays are then
            `(B / images, images * L, s, H, h)` and `(B / images, images * T, H, h)`. It is 1 unless
            the class overrides `images_per_row`.

        Returns:
          The output of each stream, shaped like its values.
        """
        streams, context = apply_to_tree((streams, context))
        return [self.stream_attention(stream, context, text, lengths) for stream in streams]

    def stream_attention(self, stream: QKV, context: KV | None, text: KV | None, lengths: Lengths) -> Blocks:
        """Computes `block_attention` of one stream, after QK-norm and RoPE, with one image in a row.

        A class needs this method unless it overrides `block_attention`.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def cached_attention(
        self, qkv: QKV, context: KV | None, text: KV | None, layer: Index, block: Index, lengths: Lengths = None
    ) -> Block:
        """Computes attention of one block against the cache, in sampling.

        The block sees the same keys as in `block_attention`.

        Args:
          qkv: Queries, keys and values of the block, each `(B, 1, s, H, h)`.
          context: Cached keys and values from `to_cache_layout`, whose slots j < block are filled.
            The other slots get no weight, but must be finite. None lets the block attend to itself
            only.
          text: Cached keys and values of the text from `to_cache_layout`, or None.
          layer: Index of the layer in the cache.
          block: Index i of the block. Unfilled slots cost nothing, also if it is traced.
          lengths: Result of `cache_lengths`.
        """

    def write_and_attend(
        self, qkv: QKV, context: KV, text: KV | None, block: Index, lengths: Lengths = None
    ) -> tuple[Block, KV]:
        """Writes the keys and values of a block into its slot of the cache and attends to the cache.

        A loop that carries the cache writes in place. Only implementations with `unrolls_layers` have it.

        Args:
          qkv: See `cached_attention`.
          context: Cached keys and values of one layer, `(B, tokens, H, h)`, with room for all blocks
            and the text.
          text: Cached keys and values of the text in this layer, or None.
          block: See `cached_attention`.
          lengths: See `cached_attention`.

        Returns:
          The output, and the cache with the block.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def to_cache_layout(self, kv: KV) -> KV:
        """Converts keys and values of all layers to the layout that `cached_attention` reads.

        Args:
          kv: Keys and values, each `(layers, B, n, s, H, h)` or, of the text,
            `(layers, B, T, H, h)`.
        """

    def cache_lengths(self, lengths: Lengths, text: Int[Array, "images T"]) -> Lengths:
        """Returns the lengths of texts that `cached_attention` needs."""
        return lengths

    def images_per_row(self, batch: int) -> int:
        """Returns how many images of a batch `block_attention` takes in one row of tokens."""
        return 1

    def with_kernel_layout(self, x: Float[Array, "B S H h"]) -> Float[Array, "B S H h"]:
        """Stores a projection and its gradient in the memory layout that the kernel reads."""
        return x

    def attend(
        self, q: Float[Array, "B S H h"], k: Float[Array, "B K H h"], v: Float[Array, "B K H h"]
    ) -> Float[Array, "B S H h"]:
        """Computes softmax(q k^T / sqrt(h)) v, for the U-Net. The TPU kernel needs K = S."""
        if k.shape[1] == 1:
            return attend_to_one_key(q, v)
        # Normalizing after the product with v takes half the time of jax.nn's attention on a CPU,
        # which passes over the weights more often.
        q, v = (x.transpose(0, 2, 3, 1) for x in (q * q.shape[-1] ** -0.5, v))
        return column_attention(q, k.swapaxes(1, 2), v).transpose(0, 3, 1, 2)


def causal_attention(
    q: Float[Array, "B S H h"], k: Float[Array, "B S H h"], v: Float[Array, "B S H h"]
) -> Float[Array, "B S H h"]:
    """Computes softmax(q k^T / sqrt(h)) v where query i attends to keys 0..i, for the text."""
    if k.shape[1] == 1:
        return attend_to_one_key(q, v)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def attend_to_one_key(q: Float[Array, "*shape"], v: Float[Array, "..."]) -> Float[Array, "*shape"]:
    """Returns the values of the only key, which has all the weight.

    XLA on CPU does not support a bfloat16 product over one key.
    """
    return jnp.broadcast_to(v, q.shape)


def column_attention(
    q: Float[Array, "*rows h s"],
    k: Float[Array, "*rows K h"],
    v: Float[Array, "*rows h K"],
    mask: Bool[Array, "... K 1"] | None = None,
) -> Float[Array, "*rows h s"]:
    """Computes attention with the keys down the columns of the scores.

    On a CPU, sums and maxima of columns use whole registers and neither product transposes an
    operand. That is a quarter to a third faster than `xla_blocks.partial_attention`, which in turn
    takes the queries of several blocks in one product.

    Args:
      q: Scaled queries.
      k: Keys.
      v: Values.
      mask: Visible keys. None for all.
    """
    if k.shape[-2] == 1:
        return attend_to_one_key(q, v)
    scores = jnp.einsum("...kh,...hs->...ks", k, q, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=-2, keepdims=True))
    out = jnp.einsum("...hk,...ks->...hs", v, weights.astype(v.dtype), preferred_element_type=jnp.float32)
    return (out / weights.sum(axis=-2, keepdims=True)).astype(v.dtype)


def key_mask(lengths: Int[Array, " B"], text_tokens: int, image_tokens: int) -> Bool[Array, "B keys"]:
    """Returns a mask that hides the padding of the text.

    The first `lengths` text tokens and all image tokens are visible.
    """
    text = jnp.arange(text_tokens) < lengths[:, None]
    return jnp.pad(text, ((0, 0), (0, image_tokens)), constant_values=True)


def flatten_blocks(x: Blocks) -> Float[Array, "B tokens H h"]:
    """Joins the tokens of all blocks."""
    return x.reshape(len(x), -1, *x.shape[3:])


def require_query(stream: QKV) -> tuple[Projectable, Projectable, Array]:
    """Returns queries, keys and values of a stream.

    Raises:
      ValueError: The stream has no queries.
    """
    if stream.q is None:
        raise ValueError("a stream without queries can only be context")
    return stream.q, stream.k, stream.v


def select_layer(kv: KV, layer: Index) -> KV:
    """Returns the cached keys and values of one layer."""
    return KV(*(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in kv))


def checkpoint_residual(x: Float[Array, "*shape"], name: str = CHECKPOINT_NAME) -> Float[Array, "*shape"]:
    """Names `x` for policies of `jax.checkpoint`, as integers.

    `jax.checkpoint` would round a copy of a floating-point array. The result has no gradient: call it in
    the forward pass of a `jax.custom_vjp`.
    """
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, name), x.dtype)
