"""Decoder layers and stages: towers, RMSNorm, QK-norm, SwiGLU (MADFormer, section 3.3).

A tower holds the parameters of one stream in a layer. The streams meet in the layer's joint
attention. `madformer.MADFormer` has two `LayerStack`s, its AR layers and its diffusion layers. It
calls them for all blocks at once in training and through `step` in sampling. A new kind of layer
goes into `Tower`. Shapes use the letters of the legend in `models.madformer`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from madformer_jax.models.cache import Layers, StageCache, select_stack
from madformer_jax.models.layers import (
    XAVIER_QKV_INIT,
    NormScale,
    Params,
    ProductAndBias,
    SwigluProduct,
    dense,
    rms_norm,
    unstack_layers,
)
from madformer_jax.models.remat import REMAT_POLICIES, name_projection
from madformer_jax.ops import scan_layers
from madformer_jax.ops.attention.base import KV, QKV, Attention, Index, causal_attention, select_layer
from madformer_jax.ops.attention.qk_norm_rope import ProjectedQK, apply_to_tree
from madformer_jax.ops.rope import RotaryTable

ATTENTION_NORM_EPS = 1e-5


class Streams(NamedTuple):
    """Hidden states that the decoder layers carry; an absent or finished stream is None."""

    text: Float[Array, "B T d"] | None = None
    clean: Float[Array, "B L s d"] | None = None
    pred: Float[Array, "B L s d"] | None = None  # the prediction stream, in the diffusion layers the noisy blocks

    @property
    def as_dict(self) -> dict[str, Array]:
        """The streams that are not None, by name."""
        return {name: x for name, x in self._asdict().items() if x is not None}

    def select(self, names: tuple[str, ...]) -> "Streams":
        """Returns the streams with these names; all others become None."""
        return Streams(**{name: x for name, x in self.as_dict.items() if name in names})


class Tower(nn.Module):
    """Parameters of one stream in a decoder layer.

    The layer's joint attention runs between `qkv` and `output_and_mlp`.
    """

    width: int
    heads: int
    mlp_width: int
    dtype: DTypeLike
    device: str  # cpu, gpu or tpu
    remat: str = "none"

    def setup(self) -> None:
        d, dtype = self.width, self.dtype
        self.attention_norm = rms_norm(ATTENTION_NORM_EPS, dtype)
        projection = ProductAndBias if self.device == "gpu" else dense
        self.query = projection(d, ("embed", "heads"), dtype, init=XAVIER_QKV_INIT)
        self.key = projection(d, ("embed", "heads"), dtype, init=XAVIER_QKV_INIT)
        self.value = dense(d, ("embed", "heads"), dtype, init=XAVIER_QKV_INIT)
        self.query_norm = NormScale(d // self.heads)
        self.key_norm = NormScale(d // self.heads)
        self.out = dense(d, ("heads", "embed"), dtype)
        self.mlp_norm = rms_norm(ATTENTION_NORM_EPS, dtype)
        self.gate = dense(self.mlp_width, ("embed", "mlp"), dtype, bias=False)
        self.up = dense(self.mlp_width, ("embed", "mlp"), dtype, bias=False)
        self.down = SwigluProduct(d, dtype, one_pass=self.device == "gpu")

    def qkv(
        self,
        x: Float[Array, "rows S d"],
        position: RotaryTable,
        attention: Attention | None = None,
        queries: bool = True,
    ) -> QKV:
        """Projects a stream to queries, keys and values.

        Args:
          x: Hidden states. A row holds the tokens of one or more images.
          position: Rotary table `(..., h)` of one image, or `(B, L, s, h)` of each image.
          attention: Implementation that decides the layout in memory, or None for the default.
          queries: If False, computes keys and values only.

        Returns:
          Queries, keys and values of all images in a row, `(rows, blocks, s, H, h)` of an image
          stream and `(rows, tokens, H, h)` of the text. Queries and keys are `ProjectedQK`, before
          QK-norm and RoPE.
        """
        y = self.attention_norm(x)
        size = self.width // self.heads

        def heads(projection: Float[Array, "rows S d"]) -> Float[Array, "rows *tokens H h"]:
            rows = name_projection(projection, self.remat).reshape(*x.shape[:2], self.heads, size)
            rows = attention.with_kernel_layout(rows) if attention else rows
            return rows.reshape(len(x), -1, *position.cos.shape[1:-1][-1:], self.heads, size)

        def project(layer: Any, norm: NormScale) -> ProjectedQK:
            x, bias = layer(y) if self.device == "gpu" else (layer(y), None)
            if bias is not None and attention is not None and attention.adds_bias:
                return ProjectedQK(heads(x), norm(), position, bias.reshape(self.heads, size))
            return ProjectedQK(heads(x if bias is None else x + bias), norm(), position)

        q = project(self.query, self.query_norm) if queries else None
        return QKV(q, project(self.key, self.key_norm), heads(self.value(y)))

    def output_and_mlp(self, x: Float[Array, "rows S d"], attended: Float[Array, "..."]) -> Float[Array, "rows S d"]:
        """Applies the output projection and SwiGLU, each with its residual.

        Args:
          x: Hidden states.
          attended: Result of the attention, with as many values as x.

        Returns:
          New hidden states.
        """
        x = x + self.out(attended.reshape(x.shape))
        y = self.mlp_norm(x)
        return x + self.down(*(name_projection(z, self.remat) for z in (self.gate(y), self.up(y))))


class DecoderLayer(nn.Module):
    """A decoder layer: each stream's tower, with joint attention between the streams.

    Attributes:
      towers: Maps the name of a stream to the name of its tower. Streams may share a tower.
      block_only: Restricts image blocks to themselves and the text (Table 5).
      device: Platform that the layer will run on: cpu, gpu or tpu.
      remat: "none" or a key of REMAT_POLICIES.
    """

    width: int
    heads: int
    mlp_width: int
    dtype: DTypeLike
    towers: Mapping[str, str]
    block_only: bool
    attention: Attention
    device: str = "cpu"
    remat: str = "none"

    def setup(self) -> None:
        self.tower = {
            name: Tower(self.width, self.heads, self.mlp_width, self.dtype, self.device, self.remat)
            for name in sorted(set(self.towers.values()))
        }

    def _qkv(self, name: str, *args: Any) -> QKV:
        return self.tower[self.towers[name]].qkv(*args)

    def _output_and_mlp(
        self, name: str, x: Float[Array, "rows S d"], attended: Float[Array, "..."]
    ) -> Float[Array, "rows S d"]:
        x = self.tower[self.towers[name]].output_and_mlp(x, attended)
        return nn.with_logical_constraint(x, ("batch", "tokens", "embed"))

    def __call__(
        self,
        streams: Streams,
        positions: Mapping[str, RotaryTable],
        lengths: Int[Array, " B"] | None,
        keys_only: tuple[str, ...],
    ) -> tuple[Streams, None]:
        """Runs the layer on all blocks, for training.

        Args:
          streams: Hidden states, each `(rows, S, d)`. A row holds the tokens of one or more images.
          positions: Rotary table of each stream: of one image, or of each image (B, ...).
          lengths: Number of text tokens of each image. By default all T tokens are text.
            Padding is computed, but no other token attends to it.
          keys_only: Streams that end here. They give keys and values to the other streams.

        Returns:
          The streams that continue, and None, the second result that `nn.scan` requires.
        """
        inputs = streams.as_dict
        images = {name: x.shape[1] // math.prod(positions[name].cos.shape[-3:-1]) for name, x in inputs.items()}

        def project(name: str, x: Float[Array, "rows S d"]) -> QKV:
            attention = None if name == "text" else self.attention
            projected = self._qkv(name, x, positions[name], attention, name not in keys_only)
            # The kernels apply a table of one image.
            return apply_to_tree(projected) if name == "text" or positions[name].cos.ndim == 4 else projected

        qkv = {name: project(name, x) for name, x in inputs.items()}
        image_streams = [name for name in ("clean", "pred") if name in qkv and name not in keys_only]
        text = qkv.get("text")
        # Without the clean stream the prediction stream attends to its own earlier blocks.
        source = qkv.get("clean", None if "clean" in self.towers else qkv.get("pred"))
        context = None if source is None or self.block_only else source.kv
        attended: dict[str, Array] = {}
        if image_streams:
            with jax.named_scope("attention"):
                outputs = self.attention.block_attention(
                    [qkv[name] for name in image_streams],
                    context,
                    None if text is None else text.kv,
                    lengths,
                    images=images[image_streams[0]],
                )
            attended.update(zip(image_streams, outputs, strict=True))
        if text is not None and text.q is not None:
            q, k, v = (x.reshape(len(x) * images["text"], -1, *x.shape[2:]) for x in (text.q, *text.kv))
            attended["text"] = causal_attention(q, k, v)
        return Streams(**{name: self._output_and_mlp(name, inputs[name], x) for name, x in attended.items()}), None

    def step(
        self,
        streams: Streams,
        layer: Index,
        cache: StageCache,
        position: RotaryTable,
        block: Index,
        lengths: Int[Array, " B"] | None,
    ) -> tuple[Streams, KV]:
        """Runs the layer on one stream, for sampling.

        A block attends to the cache and itself, the text to itself.

        Args:
          streams: The stream, a block `(B, s, d)` or the text `(B, T, d)`.
          layer: Index of the layer in the stage's cache.
          cache: The stage's cache.
          position: Rotary table of the block or the text.
          block: Index of the block.
          lengths: Number of text tokens, if the text is padded.

        Returns:
          The stream, and its keys and values. Unrolled layers with a context return the updated context instead.
        """
        ((name, x),) = streams.as_dict.items()
        # XLA has fewer kernels if the bias is added before the heads are apart.
        attention = None if name == "text" or self.attention.adds_bias else self.attention
        qkv = apply_to_tree(self._qkv(name, x, position, attention))
        assert qkv.q is not None
        kv = qkv.kv
        if name == "text":
            attended = causal_attention(qkv.q, qkv.k, qkv.v)
        else:
            context, text = (select_stack(x, layer) for x in (None if self.block_only else cache.context, cache.text))
            index = 0 if self.attention.unrolls_layers else layer
            with jax.named_scope("attention"):
                if self.attention.unrolls_layers and context is not None:
                    words = text and select_layer(text, 0)
                    attended, kv = self.attention.write_and_attend(qkv, select_layer(context, 0), words, block, lengths)
                else:
                    attended = self.attention.cached_attention(qkv, context, text, index, block, lengths)
        return Streams(**{name: self._output_and_mlp(name, x, attended)}), kv


def _flatten_tokens(streams: Streams, images: int = 1) -> Streams:
    """Flattens the tokens of all blocks of `images` images into one row, (rows, S, d).

    The layers take one token axis instead of two, because on a TPU each further axis costs a copy.
    """
    return Streams(**{name: x.reshape(len(x) // images, -1, x.shape[-1]) for name, x in streams.as_dict.items()})


class LayerStack(nn.Module):
    """The decoder layers of one stage.

    A scan runs all layers but the last. The last layer is separate so that streams can end in it.
    """

    layers: int
    layer_fields: Mapping[str, Any]  # fields of DecoderLayer
    remat: str  # "none" or a key of REMAT_POLICIES
    unroll: int  # layers that one iteration of the scan runs

    def setup(self) -> None:
        if self.layers > 1:
            scanned = nn.scan(
                DecoderLayer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.layers - 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            self.body = scanned(**self.layer_fields)
        if self.layers:
            self.last = DecoderLayer(**self.layer_fields)

    def __call__(
        self,
        streams: Streams,
        positions: Mapping[str, RotaryTable],
        out: tuple[str, ...],
        lengths: Int[Array, " B"] | None = None,
    ) -> Streams:
        """Runs all layers on all blocks, for training.

        Args:
          streams: Hidden states, `(B, L, s, d)` of images and `(B, T, d)` of text.
          positions: Rotary table of each stream.
          out: Streams to return. The other streams end in the last layer.
          lengths: Number of text tokens of each image. By default all T tokens are text.

        Returns:
          The streams named in `out`.
        """
        inputs = streams.as_dict
        batch = len(next(iter(inputs.values())))
        streams = _flatten_tokens(streams, self.layer_fields["attention"].images_per_row(batch))
        keys_only = tuple(name for name in streams.as_dict if name not in out)
        if self.is_initializing():
            if self.layers > 1:
                streams, _ = self.body(streams, positions, lengths, ())
            if self.layers:
                streams, _ = self.last(streams, positions, lengths, keys_only)
        elif self.layers:
            common = positions, lengths
            if self.layers > 1:
                body = nn.meta.unbox(self.body.variables["params"])
                streams = scan_layers.run(self._layer(()), body, streams, common, self.unroll)
            streams = self._layer(keys_only)(nn.meta.unbox(self.last.variables["params"]), streams, common)
        return Streams(**{name: x.reshape(inputs[name].shape) for name, x in streams.select(out).as_dict.items()})

    def _layer(self, keys_only: tuple[str, ...]) -> scan_layers.LayerFn:
        """Returns a layer as a function of its parameters, rematerialized by the policy `remat`."""
        layer = DecoderLayer(**self.layer_fields, parent=None)

        def run(params: Params, streams: Streams, common: tuple[Mapping[str, RotaryTable], Array | None]) -> Streams:
            return layer.apply({"params": params}, streams, *common, keys_only)[0]

        if self.remat == "none":
            return run
        return jax.checkpoint(run, policy=REMAT_POLICIES[self.remat], prevent_cse=False)

    def step(
        self,
        name: str,
        x: Float[Array, "B *tokens d"],
        cache: StageCache,
        position: RotaryTable,
        block: Index,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B *tokens d"], Layers | None]:
        """Runs all layers on one stream, for sampling.

        Args:
          name: Name of the stream.
          x: A block `(B, 1, s, d)` or the text `(B, T, d)`.
          cache: The stage's cache.
          position: Rotary table of the block or the text.
          block: Index of the block.
          lengths: Number of text tokens, if the text is padded.

        Returns:
          The stream, and the keys and values of all layers, `(layers, B, ..., H, h)`, or None if the
          stage has no layers. Unrolled layers with a context return the context of each layer instead.
        """
        streams, stacked_kv, kvs = _flatten_tokens(Streams(**{name: x})), [], []
        decoder_layer = DecoderLayer(**self.layer_fields, parent=None)

        def run(streams: Streams, layer_params: tuple[Params, int | Array]) -> tuple[Streams, KV]:
            params, layer = layer_params
            variables = {"params": params}
            return decoder_layer.apply(variables, streams, layer, cache, position, block, lengths, method="step")

        unrolled = []  # parameters of the layers that run without a loop
        if self.layers > 1:
            body = nn.meta.unbox(self.body.variables["params"])
            if self.layer_fields["attention"].unrolls_layers:
                body = unstack_layers({"body": body}, self.layers)["body"]
            if "0" in body:  # from `unstack_layers`
                unrolled = [body[str(layer)] for layer in range(self.layers - 1)]
            else:
                streams, kv = jax.lax.scan(run, streams, (body, jnp.arange(self.layers - 1)), unroll=self.unroll)
                stacked_kv.append(kv)
        if self.layers:
            unrolled.append(nn.meta.unbox(self.last.variables["params"]))
        for layer, params in enumerate(unrolled, self.layers - len(unrolled)):
            streams, kv = run(streams, (params, layer))
            kvs.append(kv)
        out = streams.as_dict[name].reshape(x.shape)
        has_context = name != "text" and cache.context is not None and not self.layer_fields["block_only"]
        if self.layer_fields["attention"].unrolls_layers and has_context:
            return out, tuple(kvs)
        stacked_kv += [jax.tree.map(lambda x: x[None], kv) for kv in kvs]
        kv_of_layers = KV(*map(jnp.concatenate, zip(*stacked_kv, strict=True))) if stacked_kv else None
        return out, kv_of_layers
