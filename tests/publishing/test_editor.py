"""The editor of the demo: clicks choose blocks, and the others are kept."""

import numpy as np
import pytest

from madformer_jax.config.shapes import derive_sizes
from madformer_jax.errors import ConfigError
from madformer_jax.publishing import editor
from tests import tiny


def test_clicks_choose_and_mark_blocks():
    sizes = derive_sizes(tiny.get_config())  # 2 x 2 blocks of 16 pixels
    image = np.full((32, 32, 1), 200, np.uint8)
    assert [editor.block_at(xy, image, sizes) for xy in ((0, 0), (200, 191), (100, 300), (384, 384))] == [0, 1, 2, 3]
    assert editor.toggle(editor.toggle("", 3), 1) == "1,3" and editor.toggle("1,3", 1) == "3"
    marked = editor.mark(image, "1", sizes)
    assert marked.shape == (384, 384, 3)
    changed = (marked != 200).any(-1)
    assert changed[:192, 192:].all() and changed.sum() == 192**2
    assert editor.kept_blocks(" 1, 3", sizes) == [0, 2]
    with pytest.raises(ConfigError, match="'4' is not a block"):
        editor.kept_blocks("4", sizes)
