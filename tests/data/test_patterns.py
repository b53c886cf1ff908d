"""Source patterns: pictures whose structure is known, and the measure of its breaks."""

import numpy as np
import pytest

from madformer_jax.config import schema as config_lib
from madformer_jax.data import patterns, sources
from madformer_jax.errors import ConfigError
from madformer_jax.evaluation import shards
from madformer_jax.evaluation.networks.registry import NetworkOutputs


def pictures(kind: str, n: int = 32) -> np.ndarray:
    c = config_lib.base()
    c.data.source, c.data.image_size, c.data.split = f"patterns:{kind}", 32, "all"
    return sources.open_source(c).read(np.arange(n)).arrays["image"]


@pytest.mark.parametrize("kind", ["mirror", "palette"])
def test_real_pictures_are_consistent_and_halves_of_different_pictures_are_not(kind):
    real = pictures(kind)
    mixed = np.concatenate([real[:16, :, :16], real[16:, :, 16:]], axis=2)
    np.testing.assert_array_equal(patterns.Patterns.inconsistency(kind, real), 0)
    np.testing.assert_array_equal(patterns.Patterns.inconsistency(kind, real[..., :1]), 0)  # gray
    assert (patterns.Patterns.inconsistency(kind, mixed) > 5).all()


def test_the_score_of_samples_is_their_mean_inconsistency():
    images = pictures("mirror", 8)
    images[0, :, :16] = 0
    outputs = NetworkOutputs(np.zeros((8, 4), np.float32), None)
    values = sources.SOURCES["patterns"].inconsistency("mirror", images)
    arrays = shards.extract_features(lambda _: outputs._replace(inconsistency=values), images, np.zeros(8))
    np.testing.assert_array_equal(arrays["inconsistency"], values)
    assert values[0] > 50 and not values[1:].any()


def test_palette_distance_equals_a_loop_over_the_parts():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    for image, distance in zip(images, patterns.palette_distance(images), strict=True):
        bright = image.mean(-1) >= 128
        expected = []
        for chosen in (bright, ~bright):
            whole, parts = image[chosen].mean(0), []
            for i in range(4):
                for j in range(4):
                    part = np.s_[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                    if chosen[part].any():
                        parts.append(np.abs(image[part][chosen[part]].mean(0) - whole).mean())
            expected.append(np.mean(parts))
        assert distance == pytest.approx(np.mean(expected))


def test_only_neighboring_pixels_of_a_texture_are_correlated():
    bright = pictures("texture", 800)[..., 0] > 128
    near = np.corrcoef(bright[:, :, 8].ravel(), bright[:, :, 9].ravel())[0, 1]
    far = [np.corrcoef(bright[:, :, 8].ravel(), bright[:, :, x].ravel())[0, 1] for x in (18, 24, 31)]
    assert near > 0.5 and np.abs(far).max() < 0.05


def test_unknown_kinds_and_sizes_are_refused():
    c = config_lib.base()
    c.data.source = "patterns:stripes"
    with pytest.raises(ConfigError, match="patterns:texture, patterns:mirror, patterns:palette"):
        sources.open_source(c)
    c.data.source, c.data.image_size = "patterns:mirror", 36
    with pytest.raises(ConfigError, match="multiple of 8"):
        sources.open_source(c)
