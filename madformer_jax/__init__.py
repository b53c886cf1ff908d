"""MADFormer in JAX: a testbed for splitting a transformer between autoregression and diffusion."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from madformer_jax.sampling.trained_model import Model

__version__ = "0.1.0"


def load(path: str, codec: str = "") -> "Model":
    """Loads a trained model to sample from; see `sampling.trained_model.load`.

    Args:
      path: Workdir, export, converted release, or "owner/name" of a repository of the Hugging Face hub.
      codec: Folder or hub id of the VAE, in place of the one that the config names.
    """
    from madformer_jax.sampling import trained_model  # imports JAX, which --help does not need

    return trained_model.load(path, codec)
