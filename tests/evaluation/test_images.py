"""Seam and memorization scores of images with a known answer."""

import numpy as np
import pytest

from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import scores, seams
from madformer_jax.evaluation.memorization import memorization_ratio, nearest_distances


def test_seam_score_counts_steps_at_borders():
    ramp = np.broadcast_to(np.arange(12, dtype=np.uint8)[None, None, :, None], (2, 8, 12, 3)).copy()
    ramp[1, :, 6:] += 4  # a step of 5 instead of 1 between the two columns of blocks
    profiles = seams.difference_profiles(ramp)
    steps = seams.border_and_interior_steps(profiles, (8, 12), rows=1, columns=2)
    inside = (8 * 10) / (8 * 10 + 7 * 12)  # equal rows
    np.testing.assert_allclose(steps, [[1, inside], [5, inside]], rtol=1e-6)
    assert seams.seam_score(steps) == pytest.approx(3 / inside)
    across_rows = seams.border_and_interior_steps(profiles, (8, 12), rows=2, columns=1)
    np.testing.assert_allclose(across_rows[:, 0], 0)
    np.testing.assert_allclose(seams.middle_steps(ramp, 1, 2, axis=1), [[1, 1], [5, 1]], rtol=1e-6)
    np.testing.assert_allclose(seams.middle_steps(ramp, 2, 2, axis=0), 0)
    flat = seams.difference_profiles(ramp[:, :, :1].repeat(4, 2))
    assert seams.seam_score(seams.border_and_interior_steps(flat, (8, 4), 2, 2)) == 1


def test_copies_of_training_images_are_found(monkeypatch):
    random = np.random.default_rng(0)
    training, fresh = random.standard_normal((40, 5)) + 1e4, random.standard_normal((20, 5)) + 1e4
    held_out = nearest_distances(random.standard_normal((30, 5)) + 1e4, [training])
    expected = np.linalg.norm(fresh[:, None] - training, axis=2).min(axis=1)
    np.testing.assert_allclose(nearest_distances(fresh, [training]), expected)
    monkeypatch.setattr(scores, "TILE_ROWS", 7)
    np.testing.assert_allclose(nearest_distances(fresh, [training]), expected)
    np.testing.assert_allclose(nearest_distances(fresh, [training[:15], training[15:16], training[16:]]), expected)
    assert 0.7 < memorization_ratio(expected, held_out) < 1.4
    assert memorization_ratio(nearest_distances(training[5:9], [training]), held_out) == 0
    with pytest.raises(ConfigError, match="hold other images out"):
        memorization_ratio(expected, np.zeros(3))
