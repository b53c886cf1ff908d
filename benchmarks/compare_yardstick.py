"""The yardstick's side of `benchmarks.compare`."""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from ml_collections import ConfigDict

from benchmarks import turns
from benchmarks.compare_ours import load_config
from benchmarks.torch_reference import counting
from benchmarks.torch_reference.model import ModelConfig, Settings, Yardstick, model_config
from benchmarks.torch_reference.sampling import Sampler
from benchmarks.torch_reference.training import Trainer, TrainingLoss
from madformer_jax.diffusion import schedule as schedules
from madformer_jax.diffusion import solvers


def make_run(
    c: ConfigDict, model: Yardstick, workload: str, mode: str | None, device: str, batch: int
) -> Callable[[], Any]:
    """Returns a function that runs one training step or draws a batch, compiled if there is a mode."""
    config: ModelConfig = model.config
    latents = torch.randn(batch, *config.sizes.block_shape, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device) if config.vocabulary else None
    compiling: dict[str, Any] = {"compiled": mode is not None, "mode": mode}
    if workload == "train":
        trainer = Trainer(model, c, **compiling)
        return lambda: trainer.step(latents, labels).item()
    rows = solvers.make(c.sample.solver).coefficients(path(c), c.sample.spacing, c.sample.steps)
    sampler = Sampler(
        model, c.model.prediction_type, guidance=c.sample.guidance, clip_x0=c.sample.clip_x0,
        autocast=c.model.dtype == "bfloat16", **compiling,
    )  # fmt: skip
    return lambda: sampler.sample(latents, rows, labels).sum().item()


def make_model(c: ConfigDict, settings: Settings, device: str) -> Yardstick:
    """Returns the yardstick with random weights."""
    model = Yardstick(model_config(c), settings).to(device)
    torch.nn.init.normal_(model.boi)
    return model


def image_flops(c: ConfigDict, workload: str, attention: str) -> float:
    """Returns the FLOPs of one image, without computing anything. FlexAttention is counted by its dense mask."""
    model = make_model(c, Settings("sdpa" if attention == "flex" else attention), "meta")
    z = torch.empty(1, *model.config.sizes.block_shape, device="meta")
    labels = torch.empty(1, dtype=torch.int64, device="meta") if model.config.vocabulary else None
    if workload == "train":
        t = torch.empty(z.shape[:2], dtype=torch.int64, device="meta")
        return counting.flops(lambda: TrainingLoss(model, c).to("meta")(z, t, z, labels).backward())
    draw = Sampler(model, c.model.prediction_type, guidance=c.sample.guidance)
    # Every evaluation of the network costs the same.
    one_step, two_steps = (
        counting.flops(
            lambda steps=steps: draw.sample(z, solvers.DDIM().coefficients(path(c), "trailing", steps), labels)
        )
        for steps in (1, 2)
    )
    return one_step + (solvers.make(c.sample.solver).evaluations(c.sample.steps) - 1) * (two_steps - one_step)


def path(c: ConfigDict) -> schedules.Schedule:
    """Returns the noise path of a config."""
    return schedules.make(**c.diffusion)


def main(settings: dict[str, Any]) -> None:
    c, workload, mode = (
        load_config(settings["config"], settings["overrides"]),
        settings["workload"],
        settings.get("compile"),
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    turns.tune_cpu(device == "cpu")
    torch.set_float32_matmul_precision("highest" if device == "cpu" else "high")
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
    batch = c.train.batch if workload == "train" else c.sample.batch
    choice = Settings(settings["attention"], settings.get("channels_last", True))
    run = make_run(c, make_model(c, choice, device), workload, mode, device, batch)
    size = 2048 if device == "cpu" else 8192
    matrix = torch.ones(size, size, device=device, dtype=getattr(torch, c.model.dtype))
    facts = {
        "about": f"PyTorch {torch.__version__} on {device}, {torch.get_num_threads()} threads, {c.model.dtype}",
        "settings": f"{choice}, compile={mode}, fused AdamW",
        "tflop": batch * image_flops(c, workload, choice.attention) / 1e12,
    }
    turns.serve(facts, run, lambda: (matrix @ matrix)[0, 0].item(), 2.0 * size**3)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
