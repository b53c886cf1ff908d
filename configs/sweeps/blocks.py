"""L, the blocks of an image, as the number of tokens grows (the paper's Table 2).

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/blocks.py:cpu32 --workdir=runs/blocks_cpu32

Variants: cpu16, cpu32 and cpu64, drawings of that size with a patch of 4, so that they have 16, 64 and
256 tokens; gpu, ffhq1024 and imagenet256. A whole answer needs two sizes.

With L = 1 the N - D autoregressive layers see the class alone. The fair baseline of L = 1 is therefore
D = N, plain diffusion. All runs of a variant have equal training FLOPs. Bits per dimension compare all
L and D without the noise of samples.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps import budget
from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, config_beside, grid

BLOCKS = (1, 4, 16)
TRAIN_STEPS = {"cpu16": 600, "cpu32": 600, "cpu64": 300}


def get_config(variant: str = "cpu32") -> ConfigDict:
    c = config_beside(__file__, "bases.py", "drawings" if variant in TRAIN_STEPS else variant)
    if variant in TRAIN_STEPS:
        c.data.image_size, c.codec.patch = int(variant.removeprefix("cpu")), 4
        c.train.steps = TRAIN_STEPS[variant]
        c.evaluate.n = 500 if variant == "cpu64" else 1000
    c.evaluate.held_out_n = 1000
    return c


def sweep(variant: str = "cpu32") -> Sweep:
    c = get_config(variant)
    half, whole = c.model.depth // 2, c.model.depth
    plain = {"model.blocks": 1, "model.diffusion_depth": whole}
    runs = grid({"model.blocks": BLOCKS, "model.diffusion_depth": (half, whole)}, seeds=3)
    if variant == "cpu64":  # two hours allow no L = 4 and L = 16 with D = N, which no claim needs
        runs = [run for run in runs if run["model.blocks"] == 1 or run["model.diffusion_depth"] == half]
    return Sweep(
        question="Do blocks beat plain diffusion (L = 1, D = N) at equal training FLOPs?",
        runs=runs,
        train_budget=("flops", budget.training_flops(c)),
        sample_budgets={"steps": (25, 50, 100, 250) if variant in ("ffhq1024", "imagenet256") else (4, 8, 16, 32)},
        protocol=Protocol(
            primary="bits_per_dimension",
            secondary="KID",
            claims=[
                Claim(
                    f"L = {blocks} with D = N / 2 is better than L = 1 with D = N",
                    {"model.blocks": blocks, "model.diffusion_depth": half},
                    plain,
                )
                for blocks in BLOCKS[1:]
            ],
            refuted_if="L = 1 with D = N is as good as L = 4 and L = 16 at every size: no claim is shown at any size",
        ),
    )
