"""The order in which blocks are generated, and blocks as rows of the image in place of squares.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/order.py:cpu --workdir=runs/order_cpu

Variants: cpu, gpu, ffhq1024, imagenet256. Orders are compared at L = 16, since all blocks of a grid of 2 x 2
have the same distance from the center. Rows and squares are compared at L = 4. A model of random order
is scored in random orders, a new one for each image.
"""

from ml_collections import ConfigDict

from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, config_beside

SEEDS = 5
RASTER, SQUARE = {"model.blocks": 16}, {"model.blocks": 4}
ROWS = {"model.blocks": 4, "model.block_shape": "rows"}


def get_config(variant: str = "cpu") -> ConfigDict:
    c = config_beside(__file__, "bases.py", variant)
    c.train.validate_every, c.train.validate_n = c.train.steps, 1000  # the primary endpoint
    return c


def sweep(variant: str = "cpu") -> Sweep:
    reverse, center_out, random = (
        RASTER | {"model.block_order": order} for order in ("reverse", "center_out", "random")
    )
    arms = [RASTER, reverse, center_out, random, SQUARE, ROWS]
    return Sweep(
        question="Does the order or the shape of the blocks change the loss of held-out images?",
        runs=[{**arm, "seed": seed} for seed in range(SEEDS) for arm in arms],
        sample_budgets={"steps": (8,)} if variant in ("cpu", "gpu") else {"steps": (get_config(variant).sample.steps,)},
        protocol=Protocol(
            primary="held_out_loss_image",
            secondary="KID",
            claims=[
                Claim("Raster order lowers the loss against random orders", RASTER, random),
                Claim("Center-out order lowers the loss against raster order", center_out, RASTER),
                Claim("Raster order lowers the loss against reverse order", RASTER, reverse),
                Claim("Squares lower the loss against rows", SQUARE, ROWS),
            ],
            refuted_if="the simultaneous interval of a claim lies below an improvement of 2 %",
            margin=0.02,
        ),
    )
