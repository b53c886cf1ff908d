"""MADFormer: AR layers once per block, diffusion layers at every denoising step (arXiv 2506.07999, sections 1 and 3).

One set of layers, two schedules. `__call__` runs all blocks at once, for training. `read_text`, `condition`, `denoise` and
`extend` run block by block against an explicit cache, for sampling; they compute the same numbers.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from madformer_jax.config.choices import LOSS_TERMS
from madformer_jax.config.shapes import derive_sizes, vocabulary_size
from madformer_jax.models.cache import ModelCache, StageCache, write_block
from madformer_jax.models.layers import dense
from madformer_jax.models.plan import AblationSwitches, sampling_plan, training_plan
from madformer_jax.models.transformer import LayerStack, Streams
from madformer_jax.models.unet import Downsampler, Upsampler
from madformer_jax.ops import rope
from madformer_jax.ops.attention import api
from madformer_jax.ops.attention.api import KV
from madformer_jax.ops.rope import RotaryTable


class ModelOutputs(NamedTuple):
    """What the terms of the loss compare; None where the term was not asked for."""

    image: Array | None  # (B, L, positions, C) what `predicts` says of the noisy blocks: eps, v or x0
    hidden: Array | None  # (B, L, positions, C) the AR condition, upsampled
    clean: Array | None  # (B, L, positions, C) the clean stream, upsampled
    text: Array | None  # (B, T, vocabulary) logits of the next token; of no meaning behind the text's last one


class MADFormer(nn.Module):
    """The model. Fields are plain values; names as in the config (`config.base`), sizes as in `sizes.Sizes`."""

    width: int
    heads: int
    depth: int
    diffusion_depth: int
    mlp_width: int
    grid: int
    columns: int
    block_side: int
    token_side: int
    channels: int
    unet: Any  # fields shared by Downsampler and Upsampler, but the type of the computation
    neighbours: bool
    predicts: str
    rope: str
    clean_timestep: str
    hidden_from: str
    clean_stream: bool
    ar_condition: bool
    shared: bool
    block_only: bool
    vocabulary: int
    text_length: int
    attention: str
    dtype: Any
    remat: str
    unroll: int

    @property
    def blocks(self) -> int:
        return self.grid * self.columns

    @property
    def none(self) -> int:
        """The token of a conditional model that stands for no class and no caption, the vocabulary's last."""
        return self.vocabulary - 1

    @property
    def switches(self) -> AblationSwitches:
        return AblationSwitches(
            blocks=self.blocks,
            text=bool(self.vocabulary),
            clean_stream=self.clean_stream,
            ar_condition=self.ar_condition,
            hidden_from=self.hidden_from,
            block_only=self.block_only,
        )

    @property
    def block_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a latent block."""
        return self.block_side, self.block_side * self.grid // self.columns, self.channels

    @property
    def token_shape(self) -> tuple[int, int]:
        """Height and width of a block in tokens."""
        return self.token_side, self.token_side * self.grid // self.columns

    @property
    def tokens(self) -> int:
        return math.prod(self.token_shape)

    def setup(self) -> None:
        self.downsampler = Downsampler(self.width, **self.unet, dtype=self.dtype)
        self.upsampler = Upsampler(self.channels, **self.unet, dtype=self.dtype)
        self.boi = self.param(
            "boi",
            nn.with_logical_partitioning(nn.initializers.normal(1.0), ("tokens", "embed")),
            (self.tokens, self.width),
            jnp.float32,
        )
        towers = {
            name: "image" if self.shared else name for name in ("clean", "pred") if self.clean_stream or name == "pred"
        }
        if self.vocabulary:
            towers["text"] = "text"
            self.embedding = nn.Embed(
                self.vocabulary,
                self.width,
                dtype=self.dtype,
                embedding_init=nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed")),
            )
            self.text_head = dense(self.vocabulary, ("embed", "vocab"), jnp.float32, bias=False)
        layer = {
            "width": self.width,
            "heads": self.heads,
            "mlp_width": self.mlp_width,
            "dtype": self.dtype,
            "towers": towers,
            "attention": self.attention,
        }
        ar, diffusion = self.depth - self.diffusion_depth, self.diffusion_depth
        self.ar_layers = LayerStack(ar, {**layer, "block_only": False}, self.remat, self.unroll)
        self.diffusion_layers = LayerStack(diffusion, {**layer, "block_only": self.block_only}, self.remat, self.unroll)

    def _image_positions(self) -> RotaryTable:
        rows, cols = rope.image_positions(self.grid, self.token_side, self.columns)
        side = self.grid * self.token_side
        return rope.rotary_table(rows, cols, head_size=self.width // self.heads, side=side, variant=self.rope)

    def _text_positions(self) -> RotaryTable:
        rows, cols = rope.text_positions(self.text_length)
        side = self.grid * self.token_side
        return rope.rotary_table(rows, cols, head_size=self.width // self.heads, side=side, variant=self.rope)

    def _down(self, z: Array, t: Array, beside: Array | None) -> tuple[Array, list[Array]]:
        """Blocks (B, n, positions, C) with timesteps (B, n) and what is `_beside` them -> tokens (B, n, s, d), skips (B * n, ...)."""
        if beside is not None:
            z = jnp.concatenate([z, beside], axis=-1)
        tokens, skips = self.downsampler(z.reshape(-1, *self.block_shape[:2], z.shape[-1]), t.reshape(-1))
        return self._constrain(tokens.reshape(*t.shape, -1, self.width)), skips

    def _beside(self, z: Array) -> Array:
        """Of all blocks (B, L, positions, C) what stands left of each position and above it, (B, L, positions, 2 C); zero but
        where that is in another block, which is finished before.
        """
        height, width, channels = self.block_shape
        blocks = z.reshape(len(z), -1, self.columns, height, width, channels)
        left = jnp.zeros_like(blocks).at[:, :, 1:, :, 0].set(blocks[:, :, :-1, :, -1])
        above = jnp.zeros_like(blocks).at[:, 1:, :, 0].set(blocks[:, :-1, :, -1])
        return jnp.concatenate([left, above], axis=-1).reshape(*z.shape[:3], -1)

    def _up(self, h: Array, t: Array, skips: list[Array]) -> Array:
        """Tokens (B, n, s, d), timesteps (B, n) and skips -> blocks (B, n, positions, C)."""
        x = self.upsampler(h.reshape(-1, *self.token_shape, self.width), t.reshape(-1), skips)
        return x.reshape(*t.shape, -1, self.channels)

    def _constrain(self, h: Array) -> Array:
        return nn.with_logical_constraint(h, ("batch", "blocks", "tokens", "embed"))

    def _boi(self, batch: int) -> Array:
        return jnp.broadcast_to(self.boi.astype(self.dtype), (batch, 1, *self.boi.shape))

    def __call__(
        self,
        z: Array,
        noisy: Array,
        t: Array,
        tokens: Array | None = None,
        lengths: Array | None = None,
        *,
        clean_t: Array | None = None,
        terms: tuple[str, ...] = LOSS_TERMS,
    ) -> ModelOutputs:
        """The forward pass of training, all blocks at once (section 3.4). What no term in `terms` needs is not computed.

        Args:
          z, noisy: clean and noisy latent blocks, (B, L, positions, C) float32.
          t: timestep of each noisy block, (B, L) integers 0..999.
          tokens: text tokens (B, T) integers, where the model is conditional; a class, or `none`.
          lengths: tokens of each text, (B,) integers from 1 to T; what stands behind them is padding, which changes nothing.
            By default all T are text.
          clean_t: timestep given to the clean blocks (B, L); by default what `clean_timestep` says: t or zero.
          terms: terms of the loss that are wanted, of `TERMS`.
        """
        if clean_t is None:
            clean_t = t if self.clean_timestep == "noisy" else jnp.zeros_like(t)
        # whatever the switches, all parameters are made
        p = training_plan(terms, self.switches._replace(ar_condition=True) if self.is_initializing() else self.switches)

        # All blocks, clean and noisy, in one pass: half the convolutions to compile.
        given = {"clean": (z, clean_t), "noisy": (noisy, t)}
        embedded: dict[str, Array] = {}
        skips: list[Array] = []
        if p.down:
            both, times = (jnp.concatenate(x, axis=1) for x in zip(*(given[name] for name in p.down), strict=True))
            beside = jnp.tile(self._beside(z), (1, len(p.down), 1, 1)) if self.neighbours else None
            h, skips = self._down(both, times, beside)
            embedded = dict(zip(p.down, jnp.split(h, len(p.down), axis=1), strict=True))

        image = self._image_positions()
        positions = {"clean": RotaryTable(*(x[: p.clean_blocks] for x in image)), "pred": image}
        if self.vocabulary:
            positions["text"] = self._text_positions()
        before = [embedded["clean"][:, :-1]] if "clean" in p.down else []
        streams = Streams(
            text=self.embedding(tokens) if "text" in p.ar else None,
            clean=embedded["clean"][:, : p.clean_blocks] if "clean" in p.ar else None,
            pred=jnp.concatenate([self._boi(len(z)), *before], axis=1) if "pred" in p.ar else None,  # p_i = c_(i-1)
        )
        if p.ar:
            streams = self.ar_layers(streams, positions, p.between, lengths)
        condition = pred = streams.pred
        if "noisy" in p.down:
            x = embedded["noisy"]
            pred = x if condition is None or not self.ar_condition else condition + x
        if self.hidden_from == "noisy":
            condition = pred
        if p.diffusion:
            streams = self.diffusion_layers(streams._replace(pred=pred).only(p.diffusion), positions, p.out, lengths)

        # And all blocks back in one pass, each with the skip states of the blocks that it is to look like.
        back: dict[str, tuple[Any, Array, str]] = {
            "hidden": (condition, clean_t, "clean"),
            "image": (streams.pred, t, "noisy"),
            "clean": (streams.clean, clean_t, "clean"),
        }
        outputs: dict[str, Array] = {}
        if p.up:
            tokens_back, t_back, like = zip(*(back[name] for name in p.up), strict=True)
            if like != p.down:
                skips = [self._choose(x, len(z), p.down, like) for x in skips]
            blocks = self._up(jnp.concatenate(tokens_back, axis=1), jnp.concatenate(t_back, axis=1), skips)
            outputs = dict(zip(p.up, jnp.split(blocks, len(p.up), axis=1), strict=True))
        return ModelOutputs(
            image=outputs.get("image"),
            hidden=outputs.get("hidden"),
            clean=outputs.get("clean"),
            text=self.text_head(streams.text) if "text" in p.out else None,
        )

    def _choose(self, x: Array, batch: int, parts: tuple[str, ...], wanted: tuple[str, ...]) -> Array:
        """Of skip states (B * parts * L, ...) those of the parts `wanted`, in that order: (B * wanted * L, ...)."""
        split = x.reshape(batch, len(parts), self.blocks, *x.shape[1:])
        return jnp.concatenate([split[:, parts.index(name)] for name in wanted], axis=1).reshape(-1, *x.shape[1:])

    # Sampling: one block at a time. Where the cache's batch is a multiple of the block's (guidance), the block is repeated.

    def empty_cache(self, batch: int) -> ModelCache:
        """A cache with no block in it, for `batch` images (twice as many with guidance)."""
        shape = (batch, self.blocks - 1, self.tokens, self.heads, self.width // self.heads)

        def empty(layers: int, slots: bool) -> StageCache:
            if not layers or self.blocks == 1 or not slots:
                return StageCache(None, None)
            x = jnp.zeros((layers, *shape), self.dtype)
            return StageCache(api.to_cache_layout(KV(x, x), self.attention), None)

        stages = sampling_plan(self.switches)
        return ModelCache(
            empty(self.depth - self.diffusion_depth, stages.condition or stages.extend_ar),
            empty(self.diffusion_depth, not self.block_only),
        )

    def read_text(self, cache: ModelCache, tokens: Array, lengths: Array | None = None) -> ModelCache:
        """Runs the text tower on tokens (B, T), of which `lengths` (B,) are text, and puts its keys and values into the cache."""
        position = self._text_positions()
        text, ar = self.ar_layers.step("text", self.embedding(tokens), cache.ar, position, 0)
        _, diffusion = self.diffusion_layers.step("text", text, cache.diffusion, position, 0)
        ar, diffusion = (own and api.to_cache_layout(own, self.attention) for own in (ar, diffusion))
        lengths = api.cache_lengths(lengths, tokens, self.attention)
        return ModelCache(cache.ar._replace(text=ar), cache.diffusion._replace(text=diffusion), lengths)

    def begin(self, batch: int) -> Array:
        """The first block's prediction stream, BOI: (B, 1, s, d)."""
        return self._boi(batch)

    def embed_clean(self, cache: ModelCache, z: Array, t: Array, block: int | Array) -> Array:
        """A generated block (B, 1, positions, C), embedded with timestep t (a scalar): (B, 1, s, d)."""
        return self._down(z, jnp.full(z.shape[:2], t), self._finished_beside(cache, block))[0]

    def _finished_beside(self, cache: ModelCache, block: int | Array) -> Array | None:
        if cache.finished is None:
            return None
        return jax.lax.dynamic_slice_in_dim(self._beside(cache.finished), block, 1, axis=1)

    def condition(self, cache: ModelCache, pred: Array, block: int | Array) -> tuple[Array, ModelCache]:
        """The AR layers' condition for block `block` from the embedding of the block before, both (B, 1, s, d).

        Zero without the AR condition. Without the clean stream the cache takes this pass's keys and values.
        """
        if not sampling_plan(self.switches).condition:
            return jnp.zeros_like(pred), cache
        pred, own = self.ar_layers.step("pred", pred, cache.ar, self._position(block), block, cache.lengths)
        if not self.clean_stream:
            cache = cache._replace(ar=write_block(cache.ar, own, block, self.attention))
        return pred, cache

    def denoise(
        self, cache: ModelCache, condition: Array, noisy: Array, t: Array, block: int | Array
    ) -> tuple[Array, KV | None]:
        """What the model predicts of a noisy block (B, 1, positions, C) at timestep t (a scalar); the diffusion layers only.

        Returns it, (cache batch, 1, positions, C), with the layers' own keys and values, which `remember` takes.
        """
        x, skips = self._down(noisy, jnp.full(noisy.shape[:2], t), self._finished_beside(cache, block))
        repeats = condition.shape[0] // noisy.shape[0]
        x, *skips = (jnp.tile(y, (repeats,) + (1,) * (y.ndim - 1)) for y in (x, *skips))
        pred, own = self.diffusion_layers.step(
            "pred", condition + x, cache.diffusion, self._position(block), block, cache.lengths
        )
        return self._up(pred, jnp.full(x.shape[:2], t), skips), own

    def remember(self, cache: ModelCache, own: KV | None, block: int | Array) -> ModelCache:
        """Without the clean stream: caches the diffusion layers' keys and values of the last solver step."""
        return cache._replace(diffusion=write_block(cache.diffusion, own, block, self.attention))

    def extend(self, cache: ModelCache, clean: Array, block: int | Array) -> ModelCache:
        """Runs the clean tower on a generated block, embedded (B, 1, s, d), and caches its keys and values.

        Layers whose keys and values nothing reads do not run (`plan.sampling_plan`).
        """
        stages, position = sampling_plan(self.switches), self._position(block)
        if not stages.extend_ar:
            return cache
        clean, own = self.ar_layers.step("clean", clean, cache.ar, position, block, cache.lengths)
        cache = cache._replace(ar=write_block(cache.ar, own, block, self.attention))
        if not stages.extend_diffusion:
            return cache
        _, own = self.diffusion_layers.step("clean", clean, cache.diffusion, position, block, cache.lengths)
        return cache._replace(diffusion=write_block(cache.diffusion, own, block, self.attention))

    def _position(self, block: int | Array) -> RotaryTable:
        return RotaryTable(*(x[block][None] for x in self._image_positions()))


def build(c: ConfigDict, platform: str | None = None) -> MADFormer:
    """The model of a validated config; `platform` (cpu, gpu, tpu) is where it will run, by default JAX's backend."""
    m, sizes = c.model, derive_sizes(c)
    implementation = api.choose_implementation(
        m.attention, platform or jax.default_backend(), m.dtype, sizes.tokens, m.width // m.heads
    )
    unet = {
        "channels": tuple(m.unet_channels),
        "layers": m.unet_layers,
        "attention": tuple(m.unet_attention),
        "groups": m.unet_groups,
        "heads": m.unet_heads,
        "time_width": m.unet_time_width,
        "time_embedding": m.time_embedding,
        "stride": m.unet_stride,
        "kernel": m.unet_kernel,
        "attend": api.unet_implementation(implementation, [x // m.unet_heads for x in m.unet_channels]),
    }
    return MADFormer(
        width=m.width,
        heads=m.heads,
        depth=m.depth,
        diffusion_depth=m.diffusion_depth,
        mlp_width=m.mlp_width,
        grid=sizes.grid,
        columns=sizes.columns,
        block_side=sizes.block_side,
        token_side=sizes.token_side,
        channels=sizes.channels,
        unet=unet,
        neighbours=m.unet_context,
        predicts=m.prediction_type,
        rope=m.rope,
        clean_timestep=m.clean_timestep,
        hidden_from=m.hidden_from,
        clean_stream=m.clean_stream,
        ar_condition=m.ar_condition,
        shared=m.param_sets == "shared",
        block_only=m.diffusion_attention == "block",
        vocabulary=vocabulary_size(c),
        text_length=c.text.length,
        attention=implementation,
        dtype=jnp.dtype(m.dtype),
        remat=m.remat,
        unroll=m.scan_unroll,
    )


def init(model: MADFormer, key: Array) -> Any:
    """Fresh float32 parameters, boxed with their logical axes (`flax.linen.meta.unbox` strips them)."""
    z = jnp.zeros((1, model.blocks, math.prod(model.block_shape[:2]), model.channels))
    t = jnp.zeros((1, model.blocks), jnp.int32)
    tokens = jnp.zeros((1, model.text_length), jnp.int32) if model.vocabulary else None
    return model.init(key, z, z, t, tokens)["params"]
