"""MADFormer in JAX: a testbed for splitting a transformer between autoregression and diffusion."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from madformer_jax.sampling.trained_model import Model

__version__ = "0.1.0"


def load(path: str, codec: str = "") -> "Model":
    """Loads a trained model of a workdir, an export, a converted release or a repository of the hub, to sample from (`api.load`)."""
    from madformer_jax.sampling import trained_model  # JAX with it, which --help does without

    return trained_model.load(path, codec)
