"""D and width at equal training FLOPs: train a small model longer, or a large one for fewer steps?

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/equal_flops.py:digits --workdir=runs/equal_flops_digits

Variants: digits, drawings, ffhq1024, imagenet256. The budget is the FLOPs that the base needs
for its steps. D does not change the FLOPs of a training step, so runs of one width train for the
same number of steps. (size.py trains all widths for the same number of steps.) Sampling budgets are
full-model passes for each guidance branch. They count every layer that runs
(`flops.model_passes`).
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
