"""MADFormer: an autoregressive transformer over image blocks whose last layers denoise.

The model and its training forward (arXiv 2506.07999, sections 1 and 3). The first N - D layers, the
AR layers, run once per block and give its condition. The last D layers, the diffusion layers, run at
every solver step. `MADFormer.__call__` runs all blocks at once, for training. Its base class
`decoding.Decoding` runs the same layers block by block against a cache, for sampling.

`diffusion.losses` calls the training forward and `diffusion.sampler` the sampling methods. A new
switch is a field of `ModelConfig` with the name that it has in `config.model`. If the switch adds or
removes a stream, it is a field of `plan.AblationSwitches`.

Dimensions:
  B: images (rows of a batch).
  L: blocks of an image, in the order of generation (`models.block_order`): raster by default.
  n: blocks in one call: 1 in sampling; in training L for each kind of block (clean, noisy) or
    output that shares the call.
  positions: latent positions of a block, flattened.
  C: channels of the latent.
  s: tokens of a block.
  T: text tokens.
  d: width of the transformer.
  H, h: attention heads and the size of a head, d = H h.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Num, PRNGKeyArray
from ml_collections import ConfigDict

from madformer_jax.config.block_orders import fixed_order
from madformer_jax.config.choices import LOSS_TERMS
from madformer_jax.config.shapes import Sizes, derive_sizes, vocabulary_size
from madformer_jax.models.block_order import Order
from madformer_jax.models.decoding import Decoding
from madformer_jax.models.layers import Params, dense
from madformer_jax.models.plan import AblationSwitches, TrainingPlan, ablation_switches, training_plan
from madformer_jax.models.transformer import LayerStack, Streams
from madformer_jax.models.unet import Downsampler, UNetConfig, Upsampler
from madformer_jax.models.unet_context import neighbor_context
from madformer_jax.ops import rope
from madformer_jax.ops.attention import api
from madformer_jax.ops.attention.base import Attention
from madformer_jax.ops.rope import RotaryTable


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Plain values that describe a model. Fields named as in `config.model` have its meaning and values."""

    sizes: Sizes  # of the latent, its blocks and their tokens
    vocabulary: int  # classes or text tokens, and `null_token`; 0 for an unconditional model
    text_length: int  # T
    # The transformer (sections 3.2 and 3.3)
    width: int  # d
    heads: int  # H
    depth: int  # N
    diffusion_depth: int  # D
    mlp_width: int
    rope: str
    # Streams and stages (section 3.4, Tables 3 and 5)
    switches: AblationSwitches  # decide which streams and stages exist
    shared_towers: bool  # `param_sets`
    clean_timestep: str
    prediction_type: str
    # The block U-Net (section 3.1)
    unet: UNetConfig
    unet_context: bool  # the U-Net also reads finished blocks beside its own (`models.unet_context`)
    block_order: str
    # The computation
    attention: Attention
    device: str  # platform that the model will run on: cpu, gpu or tpu
    dtype: DTypeLike
    remat: str
    scan_unroll: int

    @property
    def null_token(self) -> int:
        """Token for "no class" or "no caption" in a conditional model, the vocabulary's last."""
        return self.vocabulary - 1

    @property
    def default_order(self) -> np.ndarray | None:
        """Order of the blocks (L,) where none is given; None for raster order.

        A model of random order then generates in raster order. It still needs the places of the blocks.
        """
        if self.block_order == "raster":
            return None
        return fixed_order("raster" if self.block_order == "random" else self.block_order, self.sizes)


class ModelOutputs(NamedTuple):
    """Outputs that the loss terms compare with data; None if no requested term needs the output."""

    image: Float[Array, "B L positions C"] | None  # eps, v or x0 of the noisy blocks (`prediction_type`)
    # The AR condition, upsampled; if `hidden_from` is "noisy", the condition plus the noisy block.
    hidden: Float[Array, "B L positions C"] | None
    clean: Float[Array, "B L positions C"] | None  # the clean stream, upsampled
    text: Float[Array, "B T vocabulary"] | None  # next-token logits; those at a text's last token are unused


class MADFormer(Decoding):
    """The MADFormer model."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.downsampler = Downsampler(config.width, config.unet)
        self.upsampler = Upsampler(config.sizes.channels, config.unet)
        self.boi = self.param(
            "boi",
            nn.with_logical_partitioning(nn.initializers.normal(1.0), ("tokens", "embed")),
            (config.sizes.tokens, config.width),
            jnp.float32,
        )
        if config.block_order == "random":  # RoPE encodes relative places only
            self.places = self.param(
                "places",
                nn.with_logical_partitioning(nn.initializers.normal(0.02), ("blocks", "embed")),
                (config.sizes.blocks, config.width),
                jnp.float32,
            )
        towers = {
            name: "image" if config.shared_towers else name
            for name in ("clean", "pred")
            if config.switches.clean_stream or name == "pred"
        }
        if config.vocabulary:
            towers["text"] = "text"
            self.embedding = nn.Embed(
                config.vocabulary,
                config.width,
                dtype=config.dtype,
                embedding_init=nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed")),
            )
            self.text_head = dense(config.vocabulary, ("embed", "vocab"), jnp.float32, bias=False)
        layer = {
            "width": config.width,
            "heads": config.heads,
            "mlp_width": config.mlp_width,
            "dtype": config.dtype,
            "towers": towers,
            "attention": config.attention,
            "device": config.device,
            "remat": config.remat,
        }
        ar_depth, scan = config.depth - config.diffusion_depth, (config.remat, config.scan_unroll)
        self.ar_layers = LayerStack(ar_depth, {**layer, "block_only": False}, *scan)
        layer["block_only"] = config.switches.block_only
        self.diffusion_layers = LayerStack(config.diffusion_depth, layer, *scan)

    def __call__(
        self,
        z: Float[Array, "B L positions C"],
        noisy: Float[Array, "B L positions C"],
        t: Num[Array, "B L"],
        tokens: Int[Array, "B T"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        *,
        clean_t: Num[Array, "B L"] | None = None,
        terms: tuple[str, ...] = LOSS_TERMS,
        order: Order | None = None,
    ) -> ModelOutputs:
        """Computes the outputs that the loss terms need, for all blocks at once (section 3.4).

        Args:
          z: Clean latent blocks, float32.
          noisy: Noisy latent blocks.
          t: Timestep of each noisy block, from 0 to 999.
          tokens: Text tokens or a class, for a conditional model. `null_token` stands for no text.
          lengths: Number of tokens of each text, 1..T. Padding behind them changes no output. By
            default all T tokens are text.
          clean_t: Timestep of each clean block. By default t if `config.clean_timestep` is
            "noisy", and otherwise 0.
          terms: Requested terms of the loss, of `LOSS_TERMS`. Other outputs are not computed.
          order: Raster number of each block of the arguments, (L,) or (B, L). By default
            `config.default_order`.

        Returns:
          The outputs of the requested terms.
        """
        config = self.config
        if clean_t is None:
            clean_t = t if config.clean_timestep == "noisy" else jnp.zeros_like(t)
        switches = config.switches
        if self.is_initializing():  # creates all parameters, whatever the switch
            switches = switches._replace(ar_condition=True)
        plan = training_plan(terms, switches)
        order = config.default_order if order is None else order

        # One downsampler pass for clean and noisy blocks halves the convolutions to compile.
        unet_inputs = {"clean": (z, clean_t), "noisy": (noisy, t)}
        embedded: dict[str, Array] = {}
        skips: list[Array] = []
        if plan.downsampled:
            latents, timesteps = (
                jnp.concatenate(x, axis=1) for x in zip(*(unet_inputs[name] for name in plan.downsampled), strict=True)
            )
            context = None
            if config.unet_context:
                context = jnp.tile(neighbor_context(z, order, config.sizes), (1, len(plan.downsampled), 1, 1))
            h, skips = self._downsample(latents, timesteps, context)
            embedded = dict(zip(plan.downsampled, jnp.split(h, len(plan.downsampled), axis=1), strict=True))
            embedded = {name: self._add_block_embedding(x, order) for name, x in embedded.items()}

        positions = self._stream_positions(order, plan.clean_blocks)
        streams = self._ar_streams(plan, embedded.get("clean"), tokens, len(z), order)
        if plan.ar_inputs:
            streams = self.ar_layers(streams, positions, plan.ar_outputs, lengths)
        condition = pred = streams.pred
        if "noisy" in plan.downsampled:
            x = embedded["noisy"]
            pred = x if condition is None or not config.switches.ar_condition else condition + x
        if config.switches.hidden_from == "noisy":
            condition = pred
        if plan.diffusion_inputs:
            streams = streams._replace(pred=pred).select(plan.diffusion_inputs)
            streams = self.diffusion_layers(streams, positions, plan.diffusion_outputs, lengths)

        # One upsampler pass for all outputs. Each reads the skips of the blocks it reconstructs.
        unet_outputs: dict[str, tuple[Any, Array, str]] = {
            "hidden": (condition, clean_t, "clean"),
            "image": (streams.pred, t, "noisy"),
            "clean": (streams.clean, clean_t, "clean"),
        }
        outputs: dict[str, Array] = {}
        if plan.upsampled:
            hidden, t_hidden, sources = zip(*(unet_outputs[name] for name in plan.upsampled), strict=True)
            if sources != plan.downsampled:
                skips = [self._select_skips(x, len(z), plan.downsampled, sources) for x in skips]
            blocks = self._upsample(jnp.concatenate(hidden, axis=1), jnp.concatenate(t_hidden, axis=1), skips)
            outputs = dict(zip(plan.upsampled, jnp.split(blocks, len(plan.upsampled), axis=1), strict=True))
        return ModelOutputs(
            image=outputs.get("image"),
            hidden=outputs.get("hidden"),
            clean=outputs.get("clean"),
            text=self.text_head(streams.text) if "text" in plan.diffusion_outputs else None,
        )

    def _ar_streams(
        self,
        plan: TrainingPlan,
        clean: Float[Array, "B L s d"] | None,
        tokens: Int[Array, "B T"] | None,
        batch: int,
        order: Order | None,
    ) -> Streams:
        """Returns the streams that enter the AR layers (section 3.2).

        The prediction stream of block i starts from clean block i - 1, p_i = c_(i-1).
        """
        pred = None
        if "pred" in plan.ar_inputs:
            previous = [] if clean is None else [clean[:, :-1]]
            pred = self._add_block_embedding(jnp.concatenate([self.begin(batch), *previous], axis=1), order)
        return Streams(
            text=self.embedding(tokens) if "text" in plan.ar_inputs else None,
            clean=clean[:, : plan.clean_blocks] if clean is not None and "clean" in plan.ar_inputs else None,
            pred=pred,
        )

    # Parts that training and sampling share

    def _downsample(
        self, z: Float[Array, "B n positions C"], t: Num[Array, "B n"], context: Float[Array, "B n positions _"] | None
    ) -> tuple[Float[Array, "B n s d"], list[Float[Array, "{z.shape[0]*z.shape[1]} _ _ _"]]]:
        """Embeds latent blocks with the block U-Net (section 3.1).

        Args:
          z: Latent blocks.
          t: Timesteps.
          context: The neighbors of each position (`unet_context.neighbor_context`), or None without them.

        Returns:
          Tokens and the skip states `(B * n, height, width, channels)`.
        """
        if context is not None:
            z = jnp.concatenate([z, context], axis=-1)
        height, width = self.config.sizes.block_side, self.config.sizes.block_width
        tokens, skips = self.downsampler(z.reshape(-1, height, width, z.shape[-1]), t.reshape(-1))
        tokens = tokens.reshape(*t.shape, -1, self.config.width)
        return nn.with_logical_constraint(tokens, ("batch", "blocks", "tokens", "embed")), skips

    def _upsample(
        self, h: Float[Array, "B n s d"], t: Num[Array, "B n"], skips: list[Float[Array, "_ _ _ _"]]
    ) -> Float[Array, "B n positions C"]:
        """Maps tokens to latent blocks."""
        height, width = self.config.sizes.token_side, self.config.sizes.token_width
        x = self.upsampler(h.reshape(-1, height, width, h.shape[-1]), t.reshape(-1), skips)
        return x.reshape(*t.shape, -1, x.shape[-1])

    def _select_skips(
        self,
        x: Float[Array, "_ height width channels"],
        batch: int,
        names: tuple[str, ...],
        selected: tuple[str, ...],
    ) -> Float[Array, "_ height width channels"]:
        """Selects skip states from (B * names * L, ...), in order: (B * selected * L, ...)."""
        split = x.reshape(batch, len(names), self.config.sizes.blocks, *x.shape[1:])
        return jnp.concatenate([split[:, names.index(name)] for name in selected], axis=1).reshape(-1, *x.shape[1:])

    def _add_block_embedding(self, x: Float[Array, "B n s d"], numbers: Order | None) -> Float[Array, "B n s d"]:
        """Adds the learned embedding of the position of each block, in a model of random order.

        Args:
          x: Tokens.
          numbers: Raster number of each block, (n,) or (B, n).
        """
        if self.config.block_order != "random" or numbers is None:
            return x
        return x + jnp.take(self.places, numbers, axis=0)[..., None, :].astype(x.dtype)

    def _image_positions(self, order: Order | None = None) -> RotaryTable:
        """Returns the rotary table of the image tokens, (L, s, h), or (B, L, s, h) if images differ in their order."""
        sizes = self.config.sizes
        table = self._rotary_table(*rope.image_positions(sizes.grid, sizes.token_side, sizes.columns))
        return table if order is None else RotaryTable(*(jnp.take(x, order, axis=0) for x in table))

    def _stream_positions(self, order: Order | None, clean_blocks: int) -> dict[str, RotaryTable]:
        """Returns the rotary table of each stream in training; the clean stream has the first `clean_blocks` blocks."""
        image = self._image_positions(order)
        positions = {"clean": RotaryTable(*(x[..., :clean_blocks, :, :] for x in image)), "pred": image}
        return positions | ({"text": self._text_positions()} if self.config.vocabulary else {})

    def _text_positions(self) -> RotaryTable:
        """Returns the rotary table of the text tokens, (T, h)."""
        return self._rotary_table(*rope.text_positions(self.config.text_length))

    def _rotary_table(self, rows: Int[np.ndarray, "*tokens"], columns: Int[np.ndarray, "*tokens"]) -> RotaryTable:
        config = self.config
        side, head_size = config.sizes.grid * config.sizes.token_side, config.width // config.heads
        return rope.rotary_table(rows, columns, head_size=head_size, side=side, variant=config.rope)


def build(c: ConfigDict, platform: str | None = None) -> MADFormer:
    """Builds the model of a validated config.

    Args:
      c: The config.
      platform: Platform that the model will run on (cpu, gpu or tpu), by default JAX's backend.
    """
    m, sizes, dtype = c.model, derive_sizes(c), jnp.dtype(c.model.dtype)
    device = platform or jax.default_backend()
    attention = api.choose(m.attention, device, m.dtype, m.width // m.heads, sizes.tokens)
    unet = UNetConfig(
        channels=tuple(m.unet_channels),
        layers=m.unet_layers,
        attention=tuple(m.unet_attention),
        groups=m.unet_groups,
        heads=m.unet_heads,
        time_width=m.unet_time_width,
        time_embedding=m.time_embedding,
        stride=m.unet_stride,
        kernel=m.unet_kernel,
        dtype=dtype,
        implementation=attention,
        fused_norm=device == "gpu",
    )
    # Values that the model takes as they are have the name of their config field.
    values = {field.name: m[field.name] for field in dataclasses.fields(ModelConfig) if field.name in m}
    values |= {
        "sizes": sizes,
        "vocabulary": vocabulary_size(c),
        "text_length": c.text.length,
        "switches": ablation_switches(c),
        "shared_towers": m.param_sets == "shared",
        "unet": unet,
        "attention": attention,
        "device": device,
        "dtype": dtype,
    }
    return MADFormer(ModelConfig(**values))


def init(model: MADFormer, key: PRNGKeyArray) -> Params:
    """Returns fresh float32 parameters, boxed with their logical axes.

    `flax.linen.meta.unbox` removes the boxes.
    """
    config = model.config
    z = jnp.zeros((1, *config.sizes.block_shape))
    t = jnp.zeros((1, config.sizes.blocks), jnp.int32)
    tokens = jnp.zeros((1, config.text_length), jnp.int32) if config.vocabulary else None
    return model.init(key, z, z, t, tokens)["params"]
