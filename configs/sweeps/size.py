"""D and the width of the model, at equal training steps.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/size.py:cpu --workdir=runs/size_cpu

Variants: cpu, digits, drawings, ffhq1024, imagenet256. The head size, the ratio of the MLP and the
U-Net stay the same. Sampling budgets are full-model passes for each guidance branch; they count every
layer that runs (`flops.model_passes`).
"""

from typing import Any

from ml_collections import ConfigDict

from madformer_jax.cost import flops
from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, config_beside


def get_config(variant: str = "cpu") -> ConfigDict:
    return config_beside(__file__, "bases.py", variant)


def points(c: ConfigDict) -> list[dict[str, Any]]:
    """Returns overrides for 2/3, 1 and 5/3 times the heads, each with D = N / 4, N / 2 and N."""
    m = c.model
    return [
        {
            "model.width": m.width * heads // m.heads,
            "model.heads": heads,
            "model.mlp_width": m.mlp_width * heads // m.heads,
            "model.diffusion_depth": m.depth * k // 4,
        }
        for heads in (round(m.heads * 2 / 3), m.heads, round(m.heads * 5 / 3))
        for k in (1, 2, 4)
    ]


def protocol(c: ConfigDict) -> Protocol:
    """Returns the protocol: at every width the order of D = N / 4 and D = N changes with the budget."""
    claims, few, many = [], 4 * flops.guidance_branches(c), 16 * flops.guidance_branches(c)
    arms = points(c)
    for small, _, large in zip(arms[::3], arms[1::3], arms[2::3]):
        width = small["model.width"]
        claims.append(Claim(f"At width {width} D = N / 4 is better at the small budget", small, large, ("passes", few)))
        claims.append(Claim(f"At width {width} D = N is better at the large budget", large, small, ("passes", many)))
    return Protocol("KID", "FD", claims, "an interval lies on the other side of 0")


def sweep(variant: str = "cpu") -> Sweep:
    c = get_config(variant)
    return Sweep(
        question="Does the best D depend on the size of the model?",
        runs=[{**point, "seed": seed} for seed in range(5) for point in points(c)],
        sample_budgets={"passes": [passes * flops.guidance_branches(c) for passes in (4, 16)]},
        protocol=protocol(c),
    )
