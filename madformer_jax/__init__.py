"""MADFormer in JAX: a testbed for splitting a transformer between autoregression and diffusion."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from madformer_jax.api import Model

__version__ = "0.1.0"


def load(path: str, codec: str = "") -> "Model":
    """Loads a trained model of a workdir, an export, a converted release or a repository of the hub, to sample from (`api.load`)."""
    from madformer_jax import api  # JAX with it, which --help does without

    return api.load(path, codec)
