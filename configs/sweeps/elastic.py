"""Elastic depth: models that train with a random D against models of one D.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/elastic.py:cpu --workdir=runs/elastic_cpu

Variants: cpu, gpu, drawings, ffhq1024, imagenet256. All models train for the same number of steps, which cost about
the same FLOPs at every D. An elastic model is scored at its own D only, so that each D has independent
trainings of both kinds.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid


def get_config(variant: str = "cpu") -> ConfigDict:
    c = config_beside(__file__, "bases.py", variant)
    c.train.scan = 1  # each step draws its own D
    c.train.elastic_depths = (c.model.depth // 4, c.model.depth // 2, c.model.depth)
    c.train.validate_every, c.train.validate_n = c.train.steps, 1000
    return c


def sweep(variant: str = "cpu") -> Sweep:
    depths = get_config(variant).train.elastic_depths
    return Sweep(
        question="Does one model that can be sampled at several D match models that train for one D?",
        runs=grid({"model.diffusion_depth": depths, "train.elastic_depth": (False, True)}, seeds=5),
        sample_budgets={"nfe": (2, 4, 8) if variant in ("cpu", "gpu", "drawings") else (10, 50)},
        protocol=Protocol(
            primary="held_out_loss_image",
            secondary="KID",
            claims=[
                Claim(
                    f"A model trained for D = {depth} alone has a lower loss than an elastic model at this D",
                    {"model.diffusion_depth": depth, "train.elastic_depth": False},
                    {"model.diffusion_depth": depth, "train.elastic_depth": True},
                )
                for depth in depths
            ],
            refuted_if="the simultaneous interval of a claim lies below an improvement of 2 %",
            margin=0.02,
        ),
    )
