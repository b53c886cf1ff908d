"""D and width at equal training FLOPs: small models train for more steps than large ones.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/equal_flops.py:cpu --workdir=runs/equal_flops_cpu

Variants: cpu, digits, drawings, ffhq1024, imagenet256. The training budget is that of the base config. D
does not change the FLOPs of a training step, so that all runs of a width train for the same number of steps.
size.py is the same sweep with equal steps for all widths. Sampling budgets are full-model passes for
each guidance branch; they count every layer that runs (`flops.model_passes`).
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from madformer_jax.cost import flops
from madformer_jax.sweeps import budget
from madformer_jax.sweeps.sweep_file import Sweep, config_beside

_size = runpy.run_path(str(pathlib.Path(__file__).with_name("size.py")))
points, protocol = _size["points"], _size["protocol"]


def get_config(variant: str = "cpu") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def sweep(variant: str = "cpu") -> Sweep:
    c = get_config(variant)
    return Sweep(
        question="Which D and which width are best at equal training FLOPs?",
        runs=[{**point, "seed": seed} for seed in range(5) for point in points(c)],
        train_budget=("flops", budget.training_flops(c)),
        sample_budgets={"passes": [passes * flops.guidance_branches(c) for passes in (4, 16)]},
        protocol=protocol(c),
    )
