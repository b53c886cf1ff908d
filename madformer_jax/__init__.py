"""MADFormer in JAX: a testbed for splitting a transformer between autoregression and diffusion."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from madformer_jax.sampling.trained_model import Model

__version__ = "0.1.0"


def load(path: str, codec: str = "") -> "Model":
    """Loads a trained model to draw with (`trained_model.load`).

    Args:
      path: A workdir, an export, a converted release, or a repository of the Hugging Face hub.
      codec: Folder or hub id of the VAE, if the config names no VAE or should use another one.
    """
    from madformer_jax.sampling import trained_model  # imported here because --help must not wait for JAX

    return trained_model.load(path, codec)
