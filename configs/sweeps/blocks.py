"""L, the blocks of an image, as the number of tokens grows (the paper's Table 2).

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/blocks.py:cpu32 --workdir=runs/blocks_cpu32

Variants: cpu32 and cpu64, drawings of that size with a patch of 4, so that 64 px have four times the
tokens of 32 px; ffhq1024 and imagenet256.

With L = 1 the N - D autoregressive layers see the class alone. The fair baseline of L = 1 is therefore
D = N, plain diffusion. All runs of a variant have equal training FLOPs.
"""

from ml_collections import ConfigDict

from madformer_jax.cost import flops
from madformer_jax.sweeps import budget
from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, apply_overrides, config_beside, grid

BLOCKS = (1, 4, 16)


def get_config(variant: str = "cpu32") -> ConfigDict:
    side = variant.removeprefix("cpu")
    if side not in ("32", "64"):
        return config_beside(__file__, "bases.py", variant)
    c = config_beside(__file__, "bases.py", "drawings")
    c.data.image_size, c.codec.patch = int(side), 4
    c.evaluate.n = 1000
    c.train.steps = {"32": 600, "64": 300}[side]
    return c


def sweep(variant: str = "cpu32") -> Sweep:
    c = get_config(variant)
    half, whole = c.model.depth // 2, c.model.depth
    paper = not variant.startswith("cpu")
    steps = (25, 50, 100, 250) if paper else (4, 8, 16, 32)
    split = apply_overrides(c, {"model.blocks": BLOCKS[-1], "model.diffusion_depth": half, "sample.steps": steps[2]})
    cost = flops.image_cost(split)["flops"]  # of an image at the third step count
    plain = {"model.blocks": 1, "model.diffusion_depth": whole}
    return Sweep(
        question="Do blocks beat plain diffusion (L = 1, D = N) at equal FLOPs?",
        runs=grid({"model.blocks": BLOCKS, "model.diffusion_depth": (half, whole)}, seeds=3),
        train_budget=("flops", budget.training_flops(c)),
        sample_budgets={"steps": steps},
        protocol=Protocol(
            primary="KID",
            secondary="FD",
            claims=[
                Claim(
                    f"L = {blocks} with D = N / 2 is better than L = 1 with D = N",
                    {"model.blocks": blocks, "model.diffusion_depth": half}, plain, ("flops", cost),
                )
                for blocks in BLOCKS[1:]
            ],
            refuted_if="L = 1 with D = N is as good as L = 4 and L = 16 at every size: no claim is shown at any size",
        ),
    )  # fmt: skip
