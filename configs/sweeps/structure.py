"""Numbers of blocks on data with local structure, and on data whose structure connects distant parts.

    python -m madformer_jax.main --mode=sweep --config=configs/sweeps/structure.py:cpu --workdir=runs/structure_cpu

The source `patterns` draws textures, mirrored halves and shared palettes, of 32 px and 256 tokens.
L = 1 has D = N, plain diffusion. All runs have equal training FLOPs. Bits per dimension compare all
L. The score `inconsistency` measures how far samples break the structure.
"""

from typing import Any

from ml_collections import ConfigDict

from madformer_jax.errors import ConfigError
from madformer_jax.sweeps import budget
from madformer_jax.sweeps.protocol import Claim, Protocol
from madformer_jax.sweeps.sweep_file import Sweep, config_beside

KINDS = ("texture", "mirror", "palette")
BLOCKS = (4, 16)


def get_config(variant: str = "cpu") -> ConfigDict:
    if variant != "cpu":
        raise ConfigError(f"--config: variant {variant!r} is unknown: cpu.")
    c = config_beside(__file__, "bases.py", "drawings")
    c.data.source, c.data.image_size, c.codec.patch = "patterns:mirror", 32, 2
    c.model.classes = 2
    c.train.steps = 300
    c.evaluate.network, c.evaluate.n, c.evaluate.held_out_n = "classifier", 500, 500
    return c


def sweep(variant: str = "cpu") -> Sweep:
    c = get_config(variant)
    half = c.model.depth // 2
    plain: dict[str, Any] = {"model.blocks": 1, "model.diffusion_depth": c.model.depth}
    split = [{"model.blocks": blocks, "model.diffusion_depth": half} for blocks in BLOCKS]
    sources = [{"data.source": f"patterns:{kind}"} for kind in KINDS]
    return Sweep(
        question="Do blocks help with local structure, or with structure that connects distant parts?",
        runs=[source | arm | {"seed": seed} for seed in range(3) for source in sources for arm in (plain, *split)],
        train_budget=("flops", budget.training_flops(c)),
        sample_budgets={"steps": (16,)},
        protocol=Protocol(
            primary="bits_per_dimension",
            secondary="inconsistency",
            claims=[
                Claim(
                    f"On {source['data.source']} L = {arm['model.blocks']} is better than L = 1",
                    arm,
                    plain,
                    None,
                    source,
                )
                for source in sources
                for arm in split
            ],
            refuted_if="no claim is shown for any kind",
        ),
    )
