"""Loss, optimizer and training step of the yardstick."""

import torch
from ml_collections import ConfigDict
from torch import Tensor

from benchmarks.torch_reference.model import Yardstick
from benchmarks.torch_reference.unet import autocast
from madformer_jax.diffusion.schedule import alphas_cumprod
from madformer_jax.errors import ConfigError


class TrainingLoss(torch.nn.Module):
    """The weighted loss of a batch (section 3.4), on the noise path of DDPM."""

    def __init__(self, model: Yardstick, c: ConfigDict):
        super().__init__()
        if c.diffusion.path != "ddpm":
            raise ConfigError(
                f"config.diffusion.path={c.diffusion.path!r}: the PyTorch yardstick supports only 'ddpm'."
            )
        self.model, self.prediction_type = model, c.model.prediction_type
        self.weights = {name: float(c.loss[name]) for name in model.config.terms}
        self.register_buffer("alpha_bar", torch.tensor(alphas_cumprod(), dtype=torch.float32), persistent=False)

    def forward(self, z: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns the loss, a scalar.

        Args:
          z: Clean latent blocks (B, L, positions, C).
          t: Timestep of each block, (B, L), int64.
          noise: Standard normal noise, like z.
          labels: Class of each image, (B,), of a conditional model.
        """
        alpha, sigma = (x.sqrt()[..., None, None] for x in (self.alpha_bar[t], 1 - self.alpha_bar[t]))
        targets = {"eps": noise, "v": alpha * noise - sigma * z, "x0": z}
        outputs = self.model(z, alpha * z + sigma * noise, t, labels)
        errors = {name: (x.float() - z) ** 2 for name, x in outputs.items() if name != "image"}
        errors["image"] = (outputs["image"].float() - targets[self.prediction_type]) ** 2
        if "clean" in errors and z.shape[1] > 1:
            errors["clean"] = errors["clean"][:, :-1]
        return sum(self.weights[name] * x.mean() for name, x in errors.items())


class Trainer:
    """AdamW after clipping by the global norm, and an exponential moving average of all parameters."""

    def __init__(self, model: Yardstick, c: ConfigDict, *, compiled: bool = False, mode: str | None = None):
        self.model, self.clip, self.ema_decay = model, c.optimizer.clip, c.train.ema_decay
        model.prepare()
        loss = TrainingLoss(model, c).to(model.boi.device)
        self.loss = torch.compile(loss, mode=mode) if compiled else loss
        self.autocast = c.model.dtype == "bfloat16"
        self.parameters = list(model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        o = c.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=o.learning_rate, betas=(o.b1, o.b2), weight_decay=o.weight_decay, fused=True
        )

    def step(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Runs one training step on clean latent blocks and returns the loss."""
        t = torch.randint(0, 1000, z.shape[:2], device=z.device)
        noise = torch.randn_like(z)
        with autocast(z, self.autocast):
            loss = self.loss(z, t, noise, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - self.ema_decay)
        return loss.detach()
