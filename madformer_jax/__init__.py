"""MADFormer in JAX: a testbed for splitting a transformer between autoregression and diffusion."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from madformer_jax.sampling.trained_model import Model

__version__ = "0.1.0"


def load(path: str, codec: str = "", **settings: Any) -> "Model":
    """Loads a trained model to draw with.

    The mesh and the paths of a config.json that another user has written are ignored
    (docs/weights.md).

    Args:
      path: Workdir of --mode=train or --mode=convert, or an export, locally or at gs://. Or the
        repository "owner/name" of the Hugging Face hub, which needs huggingface_hub and a network.
      codec: Folder or hub id of the VAE, if the config names no VAE or should use another one.
      settings: The weights to load. The default of each is that of the folder's config.

        - step: Step of the checkpoint; -1 is the newest.
        - weights: "ema" (averaged) or "raw".
        - ema: Width sigma_rel of a power-function average, 0.05 for example, if the training stored
          snapshots (`train.ema_snapshots`); 0 is the average of `train.ema_decay`.
        - guide: Workdir or export of a smaller or earlier model, which guides in place of the null label
          (docs/sampling.md).
        - guide_step: Step of the guide's checkpoint; -1 is the newest.

    Raises:
      ConfigError: The folder has no model, it is damaged, or a setting is wrong.

    Examples:
      >>> model = madformer_jax.load("runs/drawings")
      >>> images = model.sample(labels=["planets", "clay"], guidance=1.5)  # uint8 (2, H, W, 3)
    """
    from madformer_jax.sampling import trained_model  # imports JAX, which --help does not need

    return trained_model.load(path, codec, **settings)
