"""Seam and memorization scores of images with a known answer."""

import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import degradations, scores, seams
from madformer_jax.evaluation.memorization import find_nearest, memorization_ratio


def test_seam_score_counts_steps_at_borders():
    ramp = np.broadcast_to(np.arange(12, dtype=np.uint8)[None, None, :, None], (2, 8, 12, 3)).copy()
    ramp[1, :, 6:] += 4  # a step of 5 instead of 1 between the two columns of blocks
    profiles = seams.difference_profiles(ramp)
    steps = seams.border_and_interior_differences(profiles, (8, 12), rows=1, columns=2)
    inside = (8 * 10) / (8 * 10 + 7 * 12)  # equal rows
    np.testing.assert_allclose(steps, [[1, inside], [5, inside]], rtol=1e-6)
    assert seams.seam_score(steps) == pytest.approx(3 / inside)
    across_rows = seams.border_and_interior_differences(profiles, (8, 12), rows=2, columns=1)
    np.testing.assert_allclose(across_rows[:, 0], 0)
    np.testing.assert_allclose(seams.middle_differences(ramp, 1, 2, axis=1), [[1, 1], [5, 1]], rtol=1e-6)
    np.testing.assert_allclose(seams.middle_differences(ramp, 2, 2, axis=0), 0)
    flat = seams.difference_profiles(ramp[:, :, :1].repeat(4, 2))
    assert seams.seam_score(seams.border_and_interior_differences(flat, (8, 4), 2, 2)) == 1


def test_copies_of_training_images_are_found(monkeypatch):
    random = np.random.default_rng(0)
    training, fresh = random.standard_normal((40, 5)) + 1e4, random.standard_normal((20, 5)) + 1e4
    held_out = find_nearest(random.standard_normal((30, 5)) + 1e4, [training]).distances
    expected = np.linalg.norm(fresh[:, None] - training, axis=2).min(axis=1)
    np.testing.assert_allclose(find_nearest(fresh, [training]).distances, expected)
    monkeypatch.setattr(scores, "TILE_ROWS", 7)
    np.testing.assert_allclose(find_nearest(fresh, [training]).distances, expected)
    np.testing.assert_allclose(find_nearest(fresh, [training[:15], training[15:16], training[16:]]).distances, expected)
    assert 0.7 < memorization_ratio(expected, held_out) < 1.4
    assert memorization_ratio(find_nearest(training[5:9], [training]).distances, held_out) == 0
    with pytest.raises(ConfigError, match="hold other images out"):
        memorization_ratio(expected, np.zeros(3))


def test_degradations_change_what_they_say():
    images = np.full((2, 16, 24, 3), 100, np.uint8)
    images[..., :12, :] = 140
    numbers = np.array([3, 7])
    blocks = degradations.parse("blocks:8")(images, numbers).astype(int) - images
    assert set(np.unique(blocks)) == {-8, 8}
    for y, x in np.ndindex(4, 4):  # each block is shifted as a whole, the same in all channels
        assert len({*blocks[0, 4 * y : 4 * y + 4, 6 * x : 6 * x + 6].ravel().tolist()}) == 1
    assert (blocks[0] != blocks[1]).any()
    np.testing.assert_array_equal(degradations.parse("blocks:8")(images[1:], numbers[1:]), blocks[1:] + images[1:])
    noise = degradations.parse("noise:4")(images, numbers).astype(float) - images
    assert 3.5 < noise.std() < 4.5 and abs(noise.mean()) < 0.3
    blurred = degradations.parse("blur:1")(images, numbers)
    assert (blurred[:, :, 2] == 140).all() and (blurred[:, :, -2] == 100).all() and (blurred[:, :, 11] < 140).all()
    for text in ("blocks", "noise:-1", "blur:inf", "sharpen:2"):
        with pytest.raises(ConfigError, match="noise:DEVIATION, blur:RADIUS or blocks:OFFSET"):
            degradations.parse(text)
