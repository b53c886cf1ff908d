"""Decoder layer and stage: towers, RMSNorm, QK-norm, SwiGLU (MADFormer, section 3.3)."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from madformer_jax.models.cache import StageCache
from madformer_jax.models.layers import NORM_SCALE_INIT, XAVIER_QKV_INIT, dense, rms_norm, swiglu
from madformer_jax.ops import scan_layers
from madformer_jax.ops.attention import api, pallas_tpu
from madformer_jax.ops.attention.api import KV, QKV
from madformer_jax.ops.attention.qk_norm_rope import ProjectedQK, apply_to_tree
from madformer_jax.ops.rope import RotaryTable

ATTENTION_NORM_EPS = 1e-5


class Streams(NamedTuple):
    """What the decoder layers carry; a stream that is absent, or no longer needed, is None."""

    text: Array | None = None  # (B, T, d)
    clean: Array | None = None  # (B, blocks, s, d)
    pred: Array | None = None  # (B, blocks, s, d), the prediction (later noisy) stream

    @property
    def present(self) -> dict[str, Array]:
        return {name: x for name, x in self._asdict().items() if x is not None}

    def only(self, names: tuple[str, ...]) -> "Streams":
        return Streams(**{name: x for name, x in self.present.items() if name in names})


class NormScale(nn.Module):
    """The scale of a norm that is computed elsewhere, (size,)."""

    size: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("scale", NORM_SCALE_INIT, (self.size,), jnp.float32)


class Tower(nn.Module):
    """One stream's parameters in a decoder layer; the attention between `qkv` and `finish` is joint."""

    width: int
    heads: int
    mlp_width: int
    dtype: Any

    def setup(self) -> None:
        d, dtype = self.width, self.dtype
        self.attention_norm = rms_norm(ATTENTION_NORM_EPS, dtype)
        self.query = dense(d, ("embed", "heads"), dtype, init=XAVIER_QKV_INIT)
        self.key = dense(d, ("embed", "heads"), dtype, init=XAVIER_QKV_INIT)
        self.value = dense(d, ("embed", "heads"), dtype, init=XAVIER_QKV_INIT)
        self.query_norm = NormScale(d // self.heads)
        self.key_norm = NormScale(d // self.heads)
        self.out = dense(d, ("heads", "embed"), dtype)
        self.mlp_norm = rms_norm(ATTENTION_NORM_EPS, dtype)
        self.gate = dense(self.mlp_width, ("embed", "mlp"), dtype, bias=False)
        self.up = dense(self.mlp_width, ("embed", "mlp"), dtype, bias=False)
        self.down = dense(d, ("mlp", "embed"), dtype, bias=False)

    def qkv(self, x: Array, position: RotaryTable, implementation: str = "", queries: bool = True) -> QKV:
        """X (B, S, d) of images in a row, each at positions (..., h) -> what gives queries (unless only keys and values are wanted)
        and keys, and values, each (B, ..., H, h), in memory as `implementation` of attention reads them.
        """
        y = self.attention_norm(x)
        size = self.width // self.heads

        def heads(projection: Array) -> Array:
            rows = api.with_kernel_layout(projection.reshape(*x.shape[:2], self.heads, size), implementation)
            return rows.reshape(len(x), -1, *position.cos.shape[1:-1], self.heads, size)

        q = ProjectedQK(heads(self.query(y)), self.query_norm(), position) if queries else None
        return QKV(q, ProjectedQK(heads(self.key(y)), self.key_norm(), position), heads(self.value(y)))

    def finish(self, x: Array, attended: Array) -> Array:
        """Output projection and SwiGLU, each with its residual: x (B, S, d), attended (B, ..., H, h)."""
        x = x + self.out(attended.reshape(x.shape))
        y = self.mlp_norm(x)
        return x + self.down(swiglu(self.gate(y), self.up(y)))


class DecoderLayer(nn.Module):
    """Joint attention of all streams between their towers.

    `towers` maps a stream's name to the name of the tower that serves it; `block_only` restricts image blocks to
    themselves and the text (paper Table 5).
    """

    width: int
    heads: int
    mlp_width: int
    dtype: Any
    towers: Mapping[str, str]
    block_only: bool
    attention: str

    def setup(self) -> None:
        self.tower = {
            name: Tower(self.width, self.heads, self.mlp_width, self.dtype)
            for name in sorted(set(self.towers.values()))
        }

    def _qkv(self, name: str, *args: Any) -> QKV:
        return self.tower[self.towers[name]].qkv(*args)

    def _finish(self, name: str, x: Array, attended: Array) -> Array:
        x = self.tower[self.towers[name]].finish(x, attended)
        return nn.with_logical_constraint(x, ("batch", "tokens", "embed"))

    def __call__(
        self, streams: Streams, positions: Mapping[str, RotaryTable], lengths: Array | None, keys_only: tuple[str, ...]
    ) -> tuple[Streams, None]:
        """All blocks at once, of one image or more in each row of tokens, (rows, S, d). Streams named in `keys_only` give keys and
        values to the others and end here.

        Text ends after `lengths` (B,) tokens, by default after all; the padding behind it is computed, and seen by nobody.
        """
        given = streams.present
        images = {name: x.shape[1] // math.prod(positions[name].cos.shape[:-1]) for name, x in given.items()}

        def qkv_of(name: str, x: Array) -> QKV:
            found = self._qkv(name, x, positions[name], "" if name == "text" else self.attention, name not in keys_only)
            return apply_to_tree(found) if name == "text" else found

        qkv = {name: qkv_of(name, x) for name, x in given.items()}
        image = [name for name in ("clean", "pred") if name in qkv and name not in keys_only]
        text = qkv.get("text")
        source = qkv.get("clean", None if "clean" in self.towers else qkv.get("pred"))
        context = None if source is None or self.block_only else source.kv
        attended: dict[str, Array] = {}
        if image:
            outputs = api.block_attention(
                [qkv[name] for name in image],
                context,
                None if text is None else text.kv,
                lengths,
                implementation=self.attention,
                images=images[image[0]],
            )
            attended.update(zip(image, outputs, strict=True))
        if text is not None and text.q is not None:
            q, k, v = (x.reshape(len(x) * images["text"], -1, *x.shape[2:]) for x in (text.q, *text.kv))
            attended["text"] = api.attend(q, k, v, causal=True)
        return Streams(**{name: self._finish(name, given[name], attended[name]) for name in attended}), None

    def step(
        self,
        streams: Streams,
        layer: int | Array,
        cache: StageCache,
        position: RotaryTable,
        block: int | Array,
        lengths: Array | None,
    ) -> tuple[Streams, KV]:
        """One stream alone, in sampling: a block (B, s, d) against layer `layer` of the stage's cache, or the text (B, T, d)
        against itself.

        Returns the stream and its own keys and values, for the cache.
        """
        ((name, x),) = streams.present.items()
        own = apply_to_tree(self._qkv(name, x, position, "" if name == "text" else self.attention))
        assert own.q is not None
        if name == "text":
            attended = api.attend(own.q, own.k, own.v, causal=True)
        else:
            context = None if self.block_only else cache.context
            attended = api.cached_attention(
                own, context, cache.text, layer, block, lengths, implementation=self.attention
            )
        return Streams(**{name: self._finish(name, x, attended)}), own.kv


def _flatten_tokens(streams: Streams, images: int = 1) -> Streams:
    """The tokens of all blocks, of `images` images, in a row, as the layers take them: on a TPU each axis more is a copy."""
    return Streams(**{name: x.reshape(len(x) // images, -1, x.shape[-1]) for name, x in streams.present.items()})


_SAVE_ATTENTION = jax.checkpoint_policies.save_only_these_names(pallas_tpu.CHECKPOINT_NAME)
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _SAVE_ATTENTION
    ),
    "attention": _SAVE_ATTENTION,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class LayerStack(nn.Module):
    """A run of decoder layers: a scan over all but the last, which stands alone so that streams can end in it."""

    layers: int
    layer: Mapping[str, Any]  # fields of DecoderLayer
    remat: str
    unroll: int

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
            self.body = scanned(**self.layer)
        if self.layers:
            self.last = DecoderLayer(**self.layer)

    def __call__(
        self,
        streams: Streams,
        positions: Mapping[str, RotaryTable],
        out: tuple[str, ...],
        lengths: Array | None = None,
    ) -> Streams:
        """All blocks at once; streams that are not named in `out` end in the last layer."""
        given = streams.present
        streams = _flatten_tokens(streams, api.images_per_row(self.layer["attention"], len(next(iter(given.values())))))
        ends = tuple(name for name in streams.present if name not in out)
        if self.is_initializing():
            if self.layers > 1:
                streams, _ = self.body(streams, positions, lengths, ())
            if self.layers:
                streams, _ = self.last(streams, positions, lengths, ends)
        elif self.layers:
            common = positions, lengths
            if self.layers > 1:
                body = nn.meta.unbox(self.body.variables["params"])
                streams = scan_layers.run(self._layer(()), body, streams, common, self.unroll)
            streams = self._layer(ends)(nn.meta.unbox(self.last.variables["params"]), streams, common)
        return Streams(**{name: x.reshape(given[name].shape) for name, x in streams.only(out).present.items()})

    def _layer(self, keys_only: tuple[str, ...]) -> scan_layers.LayerFn:
        """A layer as a function of its parameters, whose gradient computes again what `remat` says."""
        layer = DecoderLayer(**self.layer, parent=None)

        def run(params: Any, streams: Streams, given: tuple[Any, Any]) -> Streams:
            return layer.apply({"params": params}, streams, *given, keys_only)[0]

        if self.remat == "none":
            return run
        return jax.checkpoint(run, policy=REMAT_POLICIES[self.remat], prevent_cse=False)

    def step(
        self,
        name: str,
        x: Array,
        cache: StageCache,
        position: RotaryTable,
        block: int | Array,
        lengths: Array | None = None,
    ) -> tuple[Array, KV | None]:
        """The stream `name` alone, x (B, 1, s, d), against the cache; returns it with the layers' own keys and values
        (layers, B, ..., H, h), None where there are no layers.
        """
        streams, own = _flatten_tokens(Streams(**{name: x})), []
        decoder_layer = DecoderLayer(**self.layer, parent=None)

        def run(streams: Streams, at: tuple[Any, int | Array]) -> tuple[Streams, KV]:
            params, layer = at
            variables = {"params": params}
            return decoder_layer.apply(variables, streams, layer, cache, position, block, lengths, method="step")

        alone = []
        if self.layers > 1:
            body = nn.meta.unbox(self.body.variables["params"])
            if "0" in body:  # as `apart` gives them
                alone = [body[str(layer)] for layer in range(self.layers - 1)]
            else:
                streams, kv = jax.lax.scan(run, streams, (body, jnp.arange(self.layers - 1)), unroll=self.unroll)
                own.append(kv)
        if self.layers:
            alone.append(nn.meta.unbox(self.last.variables["params"]))
        for layer, params in enumerate(alone, self.layers - len(alone)):
            streams, kv = run(streams, (params, layer))
            own.append(jax.tree.map(lambda x: x[None], kv))
        every = KV(*map(jnp.concatenate, zip(*own, strict=True))) if own else None
        return streams.present[name].reshape(x.shape), every


def unstack_layers(params: Any, unroll: int) -> Any:
    """The parameters of a `LayerStack`, each layer's by themselves where no loop goes over them: sampling would cut them out of
    their stack again in every solver step.
    """
    if "body" not in params or unroll < (layers := len(jax.tree.leaves(params["body"])[0])):
        return params
    return {**params, "body": {str(n): jax.tree.map(lambda x, n=n: x[n], params["body"]) for n in range(layers)}}
