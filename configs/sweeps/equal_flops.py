"""D and width at equal training FLOPs: a small model for long, or a large one briefly?

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/equal_flops.py:digits --workdir=runs/equal_flops_digits

Variants: digits, drawings, ffhq1024, imagenet256. The budget is what the base needs for its steps. D alone does not change
the FLOPs of a training step, so that runs of one width train for equal steps (size.py trains all widths for equal steps).
Sampling budgets are full-model passes, which count every layer that runs (`flops.model_passes`), for each guidance branch.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from madformer_jax.cost import flops
from madformer_jax.sweeps import budget
from madformer_jax.sweeps.sweep_file import Sweep, config_beside

points = runpy.run_path(str(pathlib.Path(__file__).with_name("size.py")))["points"]


def get_config(variant: str = "digits") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "digits") -> Sweep:
    c = get_config(variant)
    return Sweep(
        question="Which D and which width are best when training costs the same?",
        runs=[{**point, "seed": seed} for seed in range(3) for point in points(c)],
        train_budget=("flops", budget.training_flops(c)),
        sample_budgets={"passes": [passes * flops.guidance_branches(c) for passes in (4, 16)]},
    )
