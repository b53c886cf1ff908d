"""The training forward one decoder layer at a time, to look inside a trained model.

`evaluation.split_probe` calls it. The numbers are those of `MADFormer.__call__` in raster order, the only
order that it supports, with the same parameters.
Shapes use the letters of the legend in `models.madformer`; N is the number of layers.
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Num

from madformer_jax.models.layers import Params
from madformer_jax.models.madformer import MADFormer
from madformer_jax.models.plan import training_plan
from madformer_jax.models.transformer import DecoderLayer, LayerStack, Streams
from madformer_jax.models.unet_context import neighbor_context
from madformer_jax.ops.attention.base import key_mask
from madformer_jax.ops.attention.qk_norm_rope import apply_to_tree
from madformer_jax.ops.rope import RotaryTable


class Trace(NamedTuple):
    """Prediction stream and attention of every layer, AR layers first.

    In the diffusion layers the prediction stream holds the noisy blocks.
    """

    embedded: Float[Array, "B L s d"]  # the noisy blocks, which the first diffusion layer receives
    features: Float[Array, "N B L s d"]  # output of each layer
    masses: Float[Array, "N B L 3"]  # attention to earlier blocks, to the own block and to the text
    image: Float[Array, "B L positions C"]  # output of the model


class Reuse(NamedTuple):
    """Features of an earlier evaluation that replace the first layers."""

    layers: int  # number of these layers, more than N - D
    feature: Float[Array, "B L s d"]  # output of the last of them
    embedded: Float[Array, "B L s d"]  # the noisy blocks that this output contains


class LayerwiseMADFormer(MADFormer):
    """`MADFormer` with a forward that returns what each layer computes."""

    def trace(
        self,
        z: Float[Array, "B L positions C"],
        noisy: Float[Array, "B L positions C"],
        t: Num[Array, "B L"],
        tokens: Int[Array, "B T"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        reuse: Reuse | None = None,
    ) -> Trace:
        """Runs all layers on all blocks.

        Args:
          z: Clean latent blocks.
          noisy: Noisy latent blocks.
          t: Timestep of each noisy block.
          tokens: Text tokens of a conditional model.
          lengths: Number of tokens of each text.
          reuse: If given, the output of layer `reuse.layers` is that of an earlier evaluation, plus the
            difference of the two embedded noisy blocks. Features and masses of the layers up to it then
            have no meaning.

        Returns:
          The trace.
        """
        config = self.config
        clean_t = t if config.clean_timestep == "noisy" else jnp.zeros_like(t)
        context = neighbor_context(z, None, config.sizes) if config.unet_context else None
        clean = self._downsample(z, clean_t, context)[0]
        x, skips = self._downsample(noisy, t, context)
        plan = training_plan(("image",), config.switches)
        positions = self._stream_positions(None, plan.clean_blocks)
        streams = Streams(
            text=None if tokens is None else self.embedding(tokens),
            clean=clean[:, : plan.clean_blocks] if plan.clean_blocks else None,
        )
        pred = jnp.concatenate([self.begin(len(z)), clean[:, :-1]], axis=1)
        ar_depth = config.depth - config.diffusion_depth
        features, masses = [], []
        for number in range(config.depth):
            if number == ar_depth:
                pred = pred + x if config.switches.ar_condition else x
            stack = self.ar_layers if number < ar_depth else self.diffusion_layers
            params = layer_params(stack)[number - (0 if number < ar_depth else ar_depth)]
            layer = DecoderLayer(**stack.layer_fields, parent=None)
            streams = streams._replace(pred=pred)
            masses.append(attention_mass(layer, params, streams, positions, lengths))
            streams = _run_layer(layer, params, streams, positions, lengths)
            assert streams.pred is not None
            pred = streams.pred
            if reuse is not None and number + 1 == reuse.layers:
                pred = reuse.feature + x - reuse.embedded
            features.append(pred)
        return Trace(x, jnp.stack(features), jnp.stack(masses), self._upsample(pred, t, skips))


def layer_params(stack: LayerStack) -> list[Params]:
    """Returns the parameters of each layer of a stage."""
    if not stack.layers:
        return []
    layers = [nn.meta.unbox(stack.last.variables["params"])]
    if stack.layers > 1:
        body = nn.meta.unbox(stack.body.variables["params"])
        layers = [jax.tree.map(lambda x, i=i: x[i], body) for i in range(stack.layers - 1)] + layers
    return layers


def attention_mass(
    layer: DecoderLayer,
    params: Params,
    streams: Streams,
    positions: Mapping[str, RotaryTable],
    lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B L 3"]:
    """Returns how the prediction stream's attention is divided, averaged over heads and tokens.

    Args:
      layer: The layer.
      params: Its parameters.
      streams: Hidden states that enter the layer.
      positions: Rotary table of each stream.
      lengths: Number of text tokens of each image.

    Returns:
      The shares of earlier blocks, of the block itself and of the text, which add up to 1.
    """
    flat = {name: x.reshape(len(x), -1, x.shape[-1]) for name, x in streams.as_dict.items()}
    qkv = {
        name: apply_to_tree(layer.apply({"params": params}, name, x, positions[name], method="_qkv"))
        for name, x in flat.items()
    }
    q, k = qkv["pred"].q, qkv["pred"].k
    source = "clean" if "clean" in layer.towers else "pred"
    batch, blocks, tokens = q.shape[:3]
    masses = []
    for i in range(blocks):
        keys, kinds = [k[:, i]], [jnp.full(tokens, 1)]
        if i and not layer.block_only:
            earlier = qkv[source].k[:, :i].reshape(batch, -1, *k.shape[3:])
            keys, kinds = [earlier, *keys], [jnp.full(earlier.shape[1], 0), *kinds]
        if "text" in qkv:
            keys, kinds = [qkv["text"].k, *keys], [jnp.full(qkv["text"].k.shape[1], 2), *kinds]
        every, kind = jnp.concatenate(keys, axis=1), jnp.concatenate(kinds)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q[:, i], every).astype(jnp.float32) * q.shape[-1] ** -0.5
        if "text" in qkv and lengths is not None:
            length = qkv["text"].k.shape[1]
            mask = key_mask(lengths, length, every.shape[1] - length)
            scores = jnp.where(mask.reshape(batch, 1, 1, -1), scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        masses.append(jnp.mean(weights @ jax.nn.one_hot(kind, 3), axis=(1, 2)))
    return jnp.stack(masses, axis=1)


def _run_layer(
    layer: DecoderLayer,
    params: Params,
    streams: Streams,
    positions: Mapping[str, RotaryTable],
    lengths: Int[Array, " B"] | None,
) -> Streams:
    """Runs one layer on all streams, of shape (B, L, s, d) or (B, T, d)."""
    inputs = streams.as_dict
    flat = Streams(**{name: x.reshape(len(x), -1, x.shape[-1]) for name, x in inputs.items()})
    outputs = layer.apply({"params": params}, flat, positions, lengths, ())[0]
    return Streams(**{name: x.reshape(inputs[name].shape) for name, x in outputs.as_dict.items()})
