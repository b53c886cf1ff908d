"""Source `npy`: latents of any encoder, one .npy file for each image, in a folder as of source `folder`."""

import numpy as np

from madformer_jax.data import preprocess
from madformer_jax.data.folder import Folder
from madformer_jax.data.source import Examples, Kind
from madformer_jax.errors import ConfigError, first_line


class LatentFolder(Folder):
    """The latents of a folder: .npy files of floats (h, w, C)."""

    kinds: tuple[Kind, ...] = ("latents",)
    kind: Kind = "latents"
    content = "array"
    suffixes = (".npy",)

    def __init__(self, path: str):
        """Lists the folder and reads the first file, whose shape all others must have.

        Raises:
          ConfigError: See `Folder`; or the first file cannot be read.
        """
        super().__init__(path)
        try:
            self._shape = _load_latent(self._files[0], None).shape
        except (OSError, preprocess.CorruptImageError) as error:
            raise ConfigError(f"config.data.path: {self.name(0)} cannot be read: {first_line(error)}") from None

    def read(self, indices: np.ndarray) -> Examples:
        latents = np.zeros((len(indices), *self._shape), np.float32)
        for row, index in enumerate(indices.tolist()):
            latents[row] = _load_latent(self._files[index], self._shape)
        return Examples({"mean": latents}, self.labels(indices), self.captions(indices))


def _load_latent(path: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """Reads a latent and checks that it is finite in float32 and has a shape; None: any."""
    latent = preprocess.load_array(path)
    if latent.dtype.kind != "f" or latent.ndim != 3 or not (np.abs(latent) <= np.finfo(np.float32).max).all():
        raise preprocess.CorruptImageError(f"it must hold finite floats (h, w, C), not {latent.dtype} {latent.shape}")
    if shape not in (None, latent.shape):
        raise preprocess.CorruptImageError(f"its shape is {latent.shape}, and that of the first file {shape}")
    return latent
