"""D in a model that reads captions: whether a model with fewer AR layers follows the caption less.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/text_depth.py --workdir=runs/text_depth

The endpoint is the share of the attributes in a caption that the picture shows, for captions of held-out
drawings and for combinations of attributes that training never saw.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid

SPLITS = {"held-out captions": "data:test", "unseen combinations": "data:composition"}
STEPS = 8


def get_config() -> ConfigDict:
    c = config_beside(__file__, "../drawings.py", "text")
    c.train.judge = False  # the sweep evaluates its runs itself
    c.train.steps = 1500
    c.train.log_every, c.train.checkpoint_every, c.train.sample_every = 50, 500, 0
    c.model.width, c.model.heads, c.model.mlp_width = 96, 3, 256
    c.sample.batch = 100
    c.evaluate.n, c.evaluate.network = 500, "attributes"
    return c


def sweep() -> Sweep:
    layers = get_config().model.depth
    return Sweep(
        question="Does a model with fewer AR layers follow the caption less?",
        runs=grid({"model.diffusion_depth": [layers * k // 4 for k in (1, 2, 3, 4)]}, seeds=5),
        evaluations=[{"sample.prompts": prompts} for prompts in SPLITS.values()],
        sample_budgets={"steps": (STEPS,)},
        protocol=Protocol(
            primary="attributes",
            secondary="KID",
            claims=[
                Claim(
                    f"With D = N / 4 more attributes are right than with D = N for {name}",
                    {"model.diffusion_depth": layers // 4, "sample.prompts": prompts},
                    {"model.diffusion_depth": layers, "sample.prompts": prompts},
                    ("steps", STEPS),
                )
                for name, prompts in SPLITS.items()
            ],
            refuted_if="an interval lies below an improvement of 1 %",
            margin=0.01,
        ),
    )
