"""MADFormer in JAX: a testbed for splitting a transformer between autoregression and diffusion."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from madformer_jax.sampling.trained_model import Model

__version__ = "0.1.0"


def load(path: str, codec: str = "", **settings: Any) -> "Model":
    """Loads a trained model to sample from.

    >>> model = madformer_jax.load("runs/drawings")
    >>> images = model.sample(labels=["planets", "clay"], guidance=1.5)  # uint8 (2, H, W, 3)

    Args:
      path: Workdir, export, converted release, or "owner/name" of a repository of the Hugging Face hub.
      codec: Folder or hub id of the VAE, in place of the one that the config names.
      settings: The weights to load: `step`, `weights`, `ema`, `guide` and `guide_step`, as in
        `sampling.trained_model.load`.

    Raises:
      errors.ConfigError: The folder has no model, it is damaged, or a setting is wrong.
    """
    from madformer_jax.sampling import trained_model  # imports JAX, which --help does not need

    return trained_model.load(path, codec, **settings)
