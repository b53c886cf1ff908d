"""The network of the yardstick: MADFormer in plain PyTorch (sections 3.2 to 3.4).

`Yardstick.forward` is the training forward. `sampling` calls the parts of `Yardstick` one by one.
Shapes: B images, L blocks, s tokens a block, T text tokens (0 or 1, a class), d width, H heads, h head
size. The hidden states of a layer are one (B, tokens, d) array per stream.
"""

import dataclasses
import math
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from benchmarks.torch_reference.attention import Layout, attend, make_mask
from benchmarks.torch_reference.unet import Downsampler, UNetConfig, Upsampler
from madformer_jax.config.shapes import Sizes, derive_sizes, vocabulary_size
from madformer_jax.errors import ConfigError

STREAMS = ("text", "clean", "pred")
NORM_EPS, QK_NORM_EPS = 1e-5, 1e-6


@dataclasses.dataclass(frozen=True)
class Settings:
    """Implementation choices of the yardstick. They do not change its results."""

    attention: str = "sdpa"  # one of `attention.KINDS`
    channels_last: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Plain values of a model; see the fields of the same name of `config.model`."""

    sizes: Sizes
    vocabulary: int
    width: int
    heads: int
    depth: int
    diffusion_depth: int
    mlp_width: int
    axial_rope: bool
    shared_towers: bool
    terms: tuple[str, ...]  # image and, if they have a weight, hidden and clean
    clean_timestep: str
    hidden_from: str
    unet: UNetConfig


def model_config(c: ConfigDict) -> ModelConfig:
    """Returns the sizes of a validated config.

    Raises:
      ConfigError: The yardstick does not have a switch of the config.
    """
    m, sizes = c.model, derive_sizes(c)
    for field, value, supported in (
        ("model.clean_stream", m.clean_stream, True),
        ("model.ar_condition", m.ar_condition, True),
        ("model.diffusion_attention", m.diffusion_attention, "sequence"),
        ("model.unet_context", m.unet_context, False),
        ("text.vocabulary", c.text.vocabulary, 0),
        ("loss.text", c.loss.text, 0.0),
        ("loss.weighting", c.loss.weighting, "output"),
        ("train.context_noise", c.train.context_noise, 0),
        ("train.own_context", c.train.own_context, 0.0),
        ("train.accumulate", c.train.accumulate, 1),
        ("model.block_order", m.block_order, "raster"),
        ("sample.steps_by_block", c.sample.steps_by_block, "constant"),
        ("sample.diffusion_depth", c.sample.diffusion_depth, 0),
        ("sample.context_noise", c.sample.context_noise, 0),
        ("sample.guide", c.sample.guide, ""),
    ):
        if value != supported:
            raise ConfigError(f"config.{field}={value!r}: the PyTorch yardstick supports only {supported!r}.")
    unet = UNetConfig(
        sizes.channels, m.width, tuple(m.unet_channels), m.unet_layers, tuple(m.unet_attention), m.unet_groups,
        m.unet_heads, m.unet_time_width, m.time_embedding == "raw", m.unet_stride, m.unet_kernel,
    )  # fmt: skip
    terms = ("image", *(name for name in ("hidden", "clean") if c.loss[name]))
    return ModelConfig(
        sizes, vocabulary_size(c), m.width, m.heads, m.depth, m.diffusion_depth, m.mlp_width, m.rope == "axial",
        m.param_sets == "shared", terms, m.clean_timestep, m.hidden_from, unet,
    )  # fmt: skip


class RotaryTable(nn.Module):
    """Cosines and sines of all image tokens and of the text (section 3.3)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        sizes, head = config.sizes, config.width // config.heads
        side = sizes.grid * sizes.token_side
        base = (math.floor(8 * side / math.pi) // 100 + 1) * 100
        frequencies = float(base) ** -(torch.linspace(0, head, head // 4, dtype=torch.float64) / head)
        block, token = torch.arange(sizes.blocks)[:, None], torch.arange(sizes.tokens)[None]
        rows = block // sizes.columns * sizes.token_side + token // sizes.token_width
        columns = block % sizes.columns * sizes.token_width + token % sizes.token_width
        text = torch.tensor([-1])  # a class is one text token, on the diagonal before the image
        for name, row, column in (("image", rows.flatten(), columns.flatten()), ("text", text, text)):
            r, c = row[:, None] * frequencies, column[:, None] * frequencies
            angles = torch.cat((r, c, r, c) if config.axial_rope else (r, r, c, c), dim=-1)
            self.register_buffer(f"{name}_cos", angles.cos().float(), persistent=False)
            self.register_buffer(f"{name}_sin", angles.sin().float(), persistent=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Computes x * cos + rotate_half(x) * sin of (B, H, tokens, h)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Tower(nn.Module):
    """Parameters of one stream in a decoder layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, self.heads = config.width, config.heads
        self.attention_norm = nn.RMSNorm(d, eps=NORM_EPS)
        self.qkv = nn.Linear(d, 3 * d)
        self.query_norm = nn.RMSNorm(d // config.heads, eps=QK_NORM_EPS)
        self.key_norm = nn.RMSNorm(d // config.heads, eps=QK_NORM_EPS)
        self.out = nn.Linear(d, d)
        self.mlp_norm = nn.RMSNorm(d, eps=NORM_EPS)
        self.gate_up = nn.Linear(d, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, d, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, queries: bool = True) -> list[Tensor]:
        """Returns keys and values, and before them queries if asked for, each (B, H, tokens, h)."""
        y, d = self.attention_norm(x), x.shape[-1]
        if queries:
            projected = self.qkv(y)
        else:
            projected = nn.functional.linear(y, self.qkv.weight[d:], self.qkv.bias[d:])
        heads = projected.view(*x.shape[:2], -1, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind()
        *q, k, v = heads
        return [*(rotate(self.query_norm(x), cos, sin) for x in q), rotate(self.key_norm(k), cos, sin), v]

    def output_and_mlp(self, x: Tensor, attended: Tensor) -> Tensor:
        """Applies the output projection and SwiGLU to the result of attention, (B, H, tokens, h)."""
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)


class Layer(nn.Module):
    """A decoder layer: a tower for each stream, and joint attention."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        names = ["image"] if config.shared_towers else ["clean", "pred"]
        self.towers = nn.ModuleDict({name: Tower(config) for name in names + ["text"] * bool(config.vocabulary)})

    def tower(self, stream: str) -> Tower:
        """Returns the tower of a stream."""
        return self.towers[stream if stream in self.towers else "image"]

    def forward(
        self,
        streams: dict[str, Tensor],
        positions: dict[str, tuple[Tensor, Tensor]],
        layout: Layout,
        kind: str,
        mask: Any,
        out: tuple[str, ...],
    ) -> dict[str, Tensor]:
        """Runs the layer on all blocks. Streams that are not in `out` give keys and values only."""
        qkv = {name: self.tower(name).project(x, *positions[name], name in out) for name, x in streams.items()}
        k, v = (torch.cat([x[i] for x in qkv.values()], dim=2) for i in (-2, -1))
        q = torch.cat([qkv[name][0] for name in streams if name in out], dim=2)
        attended = attend(kind, q, k, v, layout, mask).split(
            [streams[name].shape[1] for name in streams if name in out], 2
        )
        names = [name for name in streams if name in out]
        return {name: self.tower(name).output_and_mlp(streams[name], x) for name, x in zip(names, attended)}


class Yardstick(nn.Module):
    """MADFormer in PyTorch."""

    def __init__(self, config: ModelConfig, settings: Settings):
        super().__init__()
        self.config, self.settings = config, settings
        # No other block attends to the last clean block, so it exists for the clean term alone.
        blocks = config.sizes.blocks
        clean_blocks = blocks - ("clean" not in config.terms)
        self.layout = Layout(int(config.vocabulary > 0), clean_blocks, blocks, config.sizes.tokens)
        self.masks: dict[str, list[Any]] = {}
        self.downsampler, self.upsampler = Downsampler(config.unet), Upsampler(config.unet)
        self.boi = nn.Parameter(torch.empty(config.sizes.tokens, config.width))
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.depth)])
        self.rotary = RotaryTable(config)
        if config.vocabulary:
            self.embedding = nn.Embedding(config.vocabulary, config.width)
        if settings.channels_last:
            self.to(memory_format=torch.channels_last)

    @property
    def ar_depth(self) -> int:
        """Number of AR layers."""
        return self.config.depth - self.config.diffusion_depth

    def embed(self, z: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Embeds latent blocks (B, n, positions, C) with timesteps (B, n).

        Returns:
          Tokens (B, n s, d) and the skip states.
        """
        sizes = self.config.sizes
        images = z.reshape(-1, sizes.block_side, sizes.block_width, z.shape[-1]).permute(0, 3, 1, 2)
        if not self.settings.channels_last:
            images = images.contiguous()
        tokens, skips = self.downsampler(images, t.reshape(-1))
        return tokens.permute(0, 2, 3, 1).reshape(len(z), -1, self.config.width), skips

    def reconstruct(self, h: Tensor, t: Tensor, skips: list[Tensor]) -> Tensor:
        """Maps tokens (B, n s, d) to latent blocks (B, n, positions, C)."""
        sizes = self.config.sizes
        maps = h.reshape(-1, sizes.token_side, sizes.token_width, h.shape[-1]).permute(0, 3, 1, 2)
        if not self.settings.channels_last:
            maps = maps.contiguous()
        blocks = self.upsampler(maps, t.reshape(-1), skips)
        return blocks.permute(0, 2, 3, 1).reshape(*t.shape, sizes.positions, -1)

    def forward(self, z: Tensor, noisy: Tensor, t: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Runs all blocks at once, for training.

        Args:
          z: Clean latent blocks (B, L, positions, C).
          noisy: Noisy latent blocks.
          t: Timestep of each noisy block, (B, L).
          labels: Class of each image, (B,), of a conditional model.

        Returns:
          The output of each term of the loss, (B, L, positions, C).
        """
        config, s = self.config, self.config.sizes.tokens
        clean_t = t if config.clean_timestep == "noisy" else torch.zeros_like(t)
        tokens, skips = self.embed(torch.cat([z, noisy]), torch.cat([clean_t, t]))
        clean, x = tokens.chunk(2)
        clean_blocks = self.layout.clean_blocks
        boi = self.boi.to(clean.dtype).expand(len(z), -1, -1)
        streams = {"pred": torch.cat([boi, clean[:, :-s]], dim=1)}
        if clean_blocks:
            streams = {"clean": clean[:, : clean_blocks * s], **streams}
        if labels is not None:
            streams = {"text": self.embedding(labels)[:, None].to(clean.dtype), **streams}
        if not torch.compiler.is_compiling():
            self.prepare()
        positions = {name: self.positions(name, 0, x.shape[1]) for name, x in streams.items()}
        for number, layer in enumerate(self.layers):
            if number == self.ar_depth:
                condition = streams["pred"]
                streams["pred"] = condition + x
            out = ("clean",) * ("clean" in config.terms) + ("pred",) if number + 1 == config.depth else STREAMS
            mask = self.masks[self.settings.attention][number + 1 == config.depth]
            streams = layer(streams, positions, self.layout, self.settings.attention, mask, out)
        if config.hidden_from == "noisy":
            condition = condition + x
        inputs = {
            "image": (streams["pred"], t),
            "hidden": (condition, clean_t),
            "clean": (streams.get("clean"), clean_t),
        }
        names = sorted(config.terms, key=("hidden", "image", "clean").index)  # the order of the skip states
        hidden, times = zip(*(inputs[name] for name in names))
        if names != ["hidden", "image"]:
            halves = [skip.chunk(2) for skip in skips]  # of the clean and of the noisy blocks
            skips = [torch.cat([half[name == "image"] for name in names]) for half in halves]
        return dict(zip(names, self.reconstruct(torch.cat(hidden), torch.cat(times), skips).chunk(len(names))))

    def prepare(self) -> None:
        """Makes the masks of the layers and of the last layer. Call it before compiling."""
        kind, text, clean = self.settings.attention, *self.layout.lengths[:2]
        if kind not in self.masks:
            first = text if "clean" in self.config.terms else text + clean
            self.masks[kind] = [make_mask(kind, self.layout, n, self.boi.device) for n in (0, first)]

    def positions(self, stream: str, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Returns the rotary table of some tokens of a stream."""
        kind = "text" if stream == "text" else "image"
        cos, sin = (getattr(self.rotary, f"{kind}_{name}") for name in ("cos", "sin"))
        return cos[start : start + length], sin[start : start + length]
