"""Sampling of the yardstick: one block at a time with a key-value cache (section 4).

Shapes as in `model`. The solver is given by its coefficients, which are those of
`madformer_jax.diffusion.solvers`, so that both sides take the same steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.torch_reference.model import Layer, Yardstick
from benchmarks.torch_reference.unet import autocast
from madformer_jax.diffusion.solvers import Coefficients
from madformer_jax.errors import ConfigError


class Sampler:
    """Draws latent blocks. `compiled` compiles what runs at every solver step."""

    def __init__(
        self, model: Yardstick, prediction_type: str, *, guidance: float = 1.0, clip_x0: float = 0.0,
        autocast: bool = False, compiled: bool = False, mode: str | None = None,
    ):  # fmt: skip
        self.model, self.prediction_type, self.clip_x0, self.autocast = model, prediction_type, clip_x0, autocast
        self.guidance = guidance if model.config.vocabulary else 1.0
        self.denoise: Callable[..., Tensor] = torch.compile(self._denoise, mode=mode) if compiled else self._denoise

    @torch.no_grad()
    def sample(self, noise: Tensor, rows: Coefficients, labels: Tensor | None = None) -> Tensor:
        """Generates latent blocks.

        Args:
          noise: Standard normal noise (B, L, positions, C).
          rows: Coefficients of all evaluations of a deterministic solver.
          labels: Class of each image, (B,), of a conditional model.

        Returns:
          The blocks, (B, L, positions, C).
        """
        if rows.previous_x_weight is not None or rows.noise_weight is not None:
            raise ConfigError("the PyTorch yardstick supports only the solvers ddim, dpmpp_2m and euler.")
        with autocast(noise, self.autocast):
            return self._sample(noise, rows, labels)

    def _sample(self, noise: Tensor, rows: Coefficients, labels: Tensor | None) -> Tensor:
        model, config = self.model, self.model.config
        branches, s = 1 + (self.guidance != 1.0), config.sizes.tokens
        ar, diffusion = range(model.ar_depth), range(model.ar_depth, config.depth)
        dtype = torch.bfloat16 if self.autocast else noise.dtype
        text = int(labels is not None)
        size = (branches * len(noise), config.heads, text + config.sizes.blocks * s, config.width // config.heads)
        self.cache = [tuple(torch.empty(size, dtype=dtype, device=noise.device) for _ in "kv") for _ in model.layers]
        if labels is not None:
            if branches == 2:
                labels = torch.cat([labels, torch.full_like(labels, config.vocabulary - 1)])
            self._run(range(config.depth), "text", model.embedding(labels)[:, None].to(dtype), 0, keys_only=True)
        pred = model.boi.detach().to(dtype).expand(branches * len(noise), -1, -1)
        clean_t = rows.level.t[-1].item() if config.clean_timestep == "noisy" else 0
        finished = []
        for block in range(config.sizes.blocks):
            condition = self._run(ar, "pred", pred, block)
            x, previous = noise[:, block : block + 1], torch.zeros_like(noise[:, :1])
            for n in range(len(rows.index)):
                x0 = self._clean_estimate(condition, x, rows, n, block)
                past = 0.0 if rows.previous_x0_weight is None else float(rows.previous_x0_weight[n])
                x = float(rows.x_weight[n]) * x + float(rows.x0_weight[n]) * x0 + past * previous
                previous = x0
            finished.append(x)
            if block + 1 < config.sizes.blocks:
                times = torch.full(x.shape[:2], clean_t, device=x.device)
                pred = model.embed(x, times)[0].repeat(branches, 1, 1)
                self._run(diffusion, "clean", self._run(ar, "clean", pred, block), block, keys_only=True)
        return torch.cat(finished, dim=1)

    def _clean_estimate(self, condition: Tensor, x: Tensor, rows: Coefficients, n: int, block: int) -> Tensor:
        """Evaluates the network at a noisy block and returns the estimate of the clean block."""
        times = torch.full(x.shape[:2], float(rows.level.t[n]), device=x.device)
        output = self.denoise(condition, x, times, block).float()
        if self.guidance != 1.0:
            conditional, unconditional = output.chunk(2)
            output = unconditional + self.guidance * (conditional - unconditional)
        alpha, sigma = float(rows.level.alpha[n]), float(rows.level.sigma[n])
        if self.prediction_type == "eps":
            output = (x - sigma * output) / alpha
        elif self.prediction_type == "v":
            output = float(rows.level.v_noise[n]) * x - sigma * output
        return output.clamp(-self.clip_x0, self.clip_x0) if self.clip_x0 else output

    def _denoise(self, condition: Tensor, x: Tensor, times: Tensor, block: int) -> Tensor:
        model, branches = self.model, len(condition) // len(x)
        h, skips = model.embed(x, times)
        h, *skips = (y.repeat(branches, *[1] * (y.ndim - 1)) for y in (h, *skips)) if branches > 1 else (h, *skips)
        h = self._run(range(model.ar_depth, model.config.depth), "pred", condition + h, block)
        return model.reconstruct(h, times.repeat(branches, 1), skips)

    def _run(self, layers: range, stream: str, x: Tensor, block: int, keys_only: bool = False) -> Tensor:
        """Runs layers on a stream and writes its keys and values into the cache.

        `keys_only` computes no more of the last layer.
        """
        for number in layers:
            last = keys_only and number == layers[-1]
            x = self._run_layer(self.model.layers[number], self.cache[number], stream, x, block, last)
        return x

    def _run_layer(
        self, layer: Layer, cache: tuple[Tensor, ...], stream: str, x: Tensor, block: int, keys_only: bool
    ) -> Tensor:
        tower, s = layer.tower(stream), self.model.config.sizes.tokens
        text = int(self.model.config.vocabulary > 0)
        start = 0 if stream == "text" else text + block * s
        end = start + x.shape[1]
        position = self.model.positions(stream, 0 if stream == "text" else block * s, x.shape[1])
        *q, k, v = tower.project(x, *position, not keys_only)
        for slots, new in zip(cache, (k, v)):
            slots[:, :, start:end] = new
        if keys_only:
            return x
        # Blocks before this one and the block itself: no mask is needed.
        return tower.output_and_mlp(x, scaled_dot_product_attention(q[0], *(slots[:, :, :end] for slots in cache)))
