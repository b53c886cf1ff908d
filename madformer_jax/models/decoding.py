"""Sampling methods of MADFormer: one block at a time against an explicit cache (section 4).

`diffusion.sampler.BlockSteps` calls these methods by name through `model.apply`. They compute the
same numbers as the training forward, `madformer.MADFormer.__call__`. For each block the order is
`condition`, then `denoise` at every solver step, then, except after the last block, `embed_clean`
and `cache_clean` on the finished block. A model without the clean stream runs `cache_noisy` in
place of `cache_clean`.

Shapes use the letters of the legend in `models.madformer`. With guidance the cache holds 2 B rows.
The U-Net then embeds B noisy blocks, and `denoise` repeats them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Num

from madformer_jax.models.block_order import Order
from madformer_jax.models.cache import Layers, ModelCache, StageCache, empty_context, to_cache, write_block
from madformer_jax.models.plan import sampling_plan
from madformer_jax.models.unet_context import neighbor_context
from madformer_jax.ops.attention.base import Index
from madformer_jax.ops.rope import RotaryTable


class Decoding(nn.Module):
    """Sampling methods of `MADFormer`, which inherits them and defines its config and layers."""

    def empty_cache(self, batch: int, order: Order | None = None) -> ModelCache:
        """Returns a cache without blocks, of `batch` rows: one per image, or two with guidance.

        Args:
          batch: Number of rows.
          order: Raster number of the block generated r-th, for each r, (L,) or (B, L). By default `config.default_order`.
        """
        config, sizes = self.config, self.config.sizes
        shape = (batch, sizes.blocks, sizes.tokens, config.heads, config.width // config.heads)
        text_tokens = config.text_length if config.vocabulary else 0

        def empty(layers: int, is_read: bool) -> StageCache:
            if not layers or sizes.blocks == 1 or not is_read:
                return StageCache(None, None)
            return StageCache(empty_context((layers, *shape), text_tokens, config.dtype, config.attention), None)

        plan = sampling_plan(config.switches)
        order = config.default_order if order is None else order
        if order is not None and order.ndim == 2:
            order = jnp.tile(order, (batch // len(order), 1))
        return ModelCache(
            empty(config.depth - config.diffusion_depth, plan.condition or plan.cache_clean_ar),
            empty(config.diffusion_depth, not config.switches.block_only),
            order=order if order is None else jnp.asarray(order),
        )

    def cache_text(
        self, cache: ModelCache, tokens: Int[Array, "B T"], lengths: Int[Array, " B"] | None = None
    ) -> ModelCache:
        """Runs the text tower and caches its keys and values.

        Args:
          cache: The cache to extend.
          tokens: Text tokens.
          lengths: Number of tokens of each text. By default all T tokens are text.

        Returns:
          The cache with the text.
        """
        attention, positions = self.config.attention, self._text_positions()
        text, ar = self.ar_layers.step("text", self.embedding(tokens), cache.ar, positions, 0)
        _, diffusion = self.diffusion_layers.step("text", text, cache.diffusion, positions, 0)
        ar, diffusion = (kv and to_cache(kv, attention) for kv in (ar, diffusion))
        lengths = attention.cache_lengths(lengths, tokens)
        return cache._replace(
            ar=cache.ar._replace(text=ar), diffusion=cache.diffusion._replace(text=diffusion), lengths=lengths
        )

    def begin(self, batch: int) -> Float[Array, "{batch} 1 s d"]:
        """Returns the first block's prediction stream, the learned begin-of-image tokens."""
        return jnp.broadcast_to(self.boi.astype(self.config.dtype), (batch, 1, *self.boi.shape))

    def condition(
        self, cache: ModelCache, pred: Float[Array, "B 1 s d"], block: Index
    ) -> tuple[Float[Array, "B 1 s d"], ModelCache]:
        """Runs the AR layers on the prediction stream.

        Args:
          cache: The cache with the text and all earlier blocks.
          pred: Embedding of the previous block, or `begin` for the first block.
          block: Index of the block to predict.

        Returns:
          The block's condition, which is 0 if `ar_condition` is off, and the cache.
          The cache includes the keys and values of this pass if the model has no clean stream or the
          attention unrolls its layers.
        """
        if not sampling_plan(self.config.switches).condition:
            return jnp.zeros_like(pred), cache
        pred = self._add_block_embedding(pred, self._block_number(cache, block, len(pred)))
        positions = self._block_positions(cache, block)
        pred, kv = self.ar_layers.step("pred", pred, cache.ar, positions, block, cache.lengths)
        # Unrolled layers have already written the keys and values, which the clean tower overwrites.
        if not self.config.switches.clean_stream or self.config.attention.unrolls_layers:
            cache = cache._replace(ar=write_block(cache.ar, kv, block, self.config.attention))
        return pred, cache

    def denoise(
        self,
        cache: ModelCache,
        condition: Float[Array, "rows 1 s d"],
        noisy: Float[Array, "B 1 positions C"],
        t: float | Num[Array, ""],
        block: Index,
    ) -> tuple[Float[Array, "rows 1 positions C"], Layers | None]:
        """Predicts eps, v or x0 of a noisy block; runs the diffusion layers only.

        Args:
          cache: The cache with the text and all earlier blocks.
          condition: The block's condition, where rows is a multiple of B.
          noisy: The noisy latent block.
          t: Its timestep.
          block: Index of the block.

        Returns:
          The prediction, and the block's keys and values in the diffusion layers, for
          `cache_noisy`.
        """
        x, skips = self._downsample(noisy, jnp.full(noisy.shape[:2], t), self._finished_context(cache, block))
        x = self._add_block_embedding(x, self._block_number(cache, block, len(x)))
        repeats = condition.shape[0] // noisy.shape[0]
        x, *skips = (jnp.tile(y, (repeats,) + (1,) * (y.ndim - 1)) for y in (x, *skips))
        pred, kv = self.diffusion_layers.step(
            "pred", condition + x, cache.diffusion, self._block_positions(cache, block), block, cache.lengths
        )
        return self._upsample(pred, jnp.full(x.shape[:2], t), skips), kv

    def embed_clean(
        self, cache: ModelCache, z: Float[Array, "B 1 positions C"], t: float | Num[Array, ""], block: Index
    ) -> Float[Array, "B 1 s d"]:
        """Embeds a finished block with timestep t."""
        tokens: Array = self._downsample(z, jnp.full(z.shape[:2], t), self._finished_context(cache, block))[0]
        return self._add_block_embedding(tokens, self._block_number(cache, block, len(tokens)))

    def cache_clean(self, cache: ModelCache, clean: Float[Array, "B 1 s d"], block: Index) -> ModelCache:
        """Runs the clean tower on a finished block and caches its keys and values.

        Layers whose keys and values nothing reads do not run (`plan.sampling_plan`).

        Args:
          cache: The cache to extend.
          clean: The embedded block, see `embed_clean`.
          block: Index of the block.

        Returns:
          The cache with the block.
        """
        plan, positions = sampling_plan(self.config.switches), self._block_positions(cache, block)
        if not plan.cache_clean_ar:
            return cache
        clean, kv = self.ar_layers.step("clean", clean, cache.ar, positions, block, cache.lengths)
        cache = cache._replace(ar=write_block(cache.ar, kv, block, self.config.attention))
        if not plan.cache_clean_diffusion:
            return cache
        _, kv = self.diffusion_layers.step("clean", clean, cache.diffusion, positions, block, cache.lengths)
        return cache._replace(diffusion=write_block(cache.diffusion, kv, block, self.config.attention))

    def cache_noisy(self, cache: ModelCache, kv: Layers | None, block: Index) -> ModelCache:
        """Caches keys and values of a block's last solver step, in models without clean stream."""
        return cache._replace(diffusion=write_block(cache.diffusion, kv, block, self.config.attention))

    def _finished_context(self, cache: ModelCache, block: Index) -> Float[Array, "B 1 positions _"] | None:
        """Returns the block's neighbors in finished blocks, or None."""
        if cache.finished_blocks is None:
            return None
        order = cache.order
        if order is not None and order.ndim == 2:
            order = order[: len(cache.finished_blocks)]
        context = neighbor_context(cache.finished_blocks, order, self.config.sizes)
        return jax.lax.dynamic_slice_in_dim(context, block, 1, axis=1)

    def _block_number(self, cache: ModelCache, block: Index, rows: int) -> Int[Array, "*rows 1"] | None:
        """Returns the raster number of a block, (1,) or (rows, 1); None in raster order."""
        if cache.order is None:
            return None
        order = cache.order if cache.order.ndim == 1 else cache.order[:rows]
        return jax.lax.dynamic_slice_in_dim(order, block, 1, axis=-1)

    def _block_positions(self, cache: ModelCache, block: Index) -> RotaryTable:
        """Returns the rotary table of one block, (1, s, h), or (rows, 1, s, h) if rows differ in their order."""
        if cache.order is None:
            return RotaryTable(*(x[block][None] for x in self._image_positions()))
        places = jax.lax.dynamic_slice_in_dim(cache.order, block, 1, axis=-1)
        return self._image_positions(places)
