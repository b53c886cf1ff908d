"""The training forward in two parts, to run several solver steps on all blocks at once.

`MADFormer.__call__` runs the AR layers and the diffusion layers in one pass, as a training step needs
them. Here the AR layers run once (`condition_blocks`) and the diffusion layers at every solver step
(`denoise_blocks`), as in sampling. Each block still reads the clean blocks before it, which are arguments
and not samples. `diffusion.own_context` calls both methods through `model.apply`. The numbers are those of
`MADFormer.__call__`, with the same parameters. Shapes use the letters of the legend in `models.madformer`.
"""

from typing import NamedTuple

from jax import Array
from jaxtyping import Float, Int, Num

from madformer_jax.models.block_order import Order
from madformer_jax.models.madformer import MADFormer
from madformer_jax.models.plan import TrainingPlan, training_plan
from madformer_jax.models.transformer import Streams
from madformer_jax.models.unet_context import neighbor_context


class BlockConditions(NamedTuple):
    """Arguments of `denoise_blocks` that are the same at every solver step."""

    streams: Streams  # text and clean streams, and as `pred` the conditions, (B, L, s, d); None if absent
    neighbors: Float[Array, "B L positions _"] | None  # adjacent values in finished blocks (`unet_context`)
    lengths: Int[Array, " B"] | None  # number of tokens of each text


class ParallelDenoiser(MADFormer):
    """`MADFormer` with separate methods for its AR layers and its diffusion layers, on all blocks."""

    def condition_blocks(
        self,
        z: Float[Array, "B L positions C"],
        clean_t: Num[Array, "B L"],
        tokens: Int[Array, "B T"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        order: Order | None = None,
    ) -> BlockConditions:
        """Embeds the clean blocks and runs the AR layers.

        Args:
          z: Clean latent blocks, in the order of generation.
          clean_t: Timestep of each clean block.
          tokens: Text tokens of a conditional model.
          lengths: Number of tokens of each text. By default all T tokens are text.
          order: Raster number of the block generated r-th, for each r, (L,) or (B, L). By default `config.default_order`.
        """
        config, plan = self.config, self._image_plan
        order = config.default_order if order is None else order
        neighbors = neighbor_context(z, order, config.sizes) if config.unet_context else None
        clean = None
        if "clean" in plan.downsampled:
            clean = self._add_block_embedding(self._downsample(z, clean_t, neighbors)[0], order)
        streams = self._ar_streams(plan, clean, tokens, len(z), order)
        if plan.ar_inputs:
            positions = self._stream_positions(order, plan.clean_blocks)
            streams = self.ar_layers(streams, positions, plan.ar_outputs, lengths)
        return BlockConditions(streams, neighbors, lengths)

    def denoise_blocks(
        self,
        conditions: BlockConditions,
        noisy: Float[Array, "B L positions C"],
        t: Num[Array, "B L"],
        order: Order | None = None,
    ) -> Float[Array, "B L positions C"]:
        """Predicts eps, v or x0 of all noisy blocks; runs the diffusion layers on all streams.

        Args:
          conditions: Result of `condition_blocks`.
          noisy: Noisy latent blocks.
          t: Timestep of each noisy block.
          order: The order of `condition_blocks`.
        """
        plan = self._image_plan
        order = self.config.default_order if order is None else order
        x, skips = self._downsample(noisy, t, conditions.neighbors)
        x = self._add_block_embedding(x, order)
        pred = x if conditions.streams.pred is None else conditions.streams.pred + x
        streams = conditions.streams._replace(pred=pred).select(plan.diffusion_inputs)
        positions = self._stream_positions(order, plan.clean_blocks)
        pred = self.diffusion_layers(streams, positions, plan.diffusion_outputs, conditions.lengths).as_dict["pred"]
        return self._upsample(pred, t, skips)

    @property
    def _image_plan(self) -> TrainingPlan:
        return training_plan(("image",), self.config.switches)
