import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax.config.shapes import derive_sizes
from madformer_jax.data import text
from madformer_jax.errors import ConfigError
from madformer_jax.models import madformer
from madformer_jax.runtime import partitioning
from madformer_jax.sampling import codec, generation, prompts
from tests import tiny
from tests.small import random_params


@pytest.fixture
def plain():
    c = tiny.get_config("plain")
    c.sample.n, c.sample.batch = 5, 2
    return c


@pytest.fixture
def noise_only(monkeypatch):
    """Replaces the sampler by one that returns its noise."""
    monkeypatch.setattr(generation.sampler, "sample", lambda model, params, noise, tokens, **settings: noise)


def draw(c, numbers, params=None, decode=None, devices=1, max_batch=None):
    """Draws the images with these numbers on a mesh of `devices` devices."""
    program = generation.make_sample_fn(c, madformer.build(c), decode or codec.build(c).decode)
    mesh = partitioning.make_mesh(-1, 1, 1, jax.devices()[:devices])
    result = list(generation.batches(c, program, params or {}, {}, mesh, numbers, max_batch))
    assert program._cache_size() == 1
    return result


def test_images_do_not_depend_on_the_batch(plain):
    plain.sample.solver, plain.diffusion.path = "ancestral", "flow"  # noise in every step
    # With small parameters, the model does not magnify rounding.
    params = jax.tree.map(lambda x: 0.1 * x, random_params(madformer.build(plain)))
    few = draw(plain, range(5), params)
    assert [batch.numbers.tolist() for batch in few] == [[0, 1], [2, 3], [4]]
    plain.sample.batch = 5
    (many,) = draw(plain, [4, 1, 3], params)
    assert (many.images.dtype, many.images.shape, many.latents.shape) == (np.uint8, (3, 32, 32, 1), (3, 8, 8, 16))
    latents = np.concatenate([batch.latents for batch in few])
    np.testing.assert_allclose(many.latents, latents[[4, 1, 3]], atol=1e-5)
    assert np.abs(latents[0] - latents[1]).max() > 0.1


def test_noise_of_images_differs_from_that_of_training_steps(plain, noise_only):
    (first, *_) = draw(plain, range(5))
    key = jax.random.key(plain.seed)
    expected, of_step = (
        jax.random.normal(jax.random.fold_in(k, 1), (1, 64, 16)) for k in (jax.random.fold_in(key, 2**31), key)
    )
    np.testing.assert_array_equal(codec.to_blocks(first.latents, derive_sizes(plain))[1], expected)
    assert np.abs(expected - of_step).max() > 1


def test_batches_have_one_shape_and_are_multiples_of_the_devices(plain, noise_only):
    plain.model.classes, plain.sample.labels = 10, "7,2,4"
    drawn = draw(plain, range(5), devices=4)
    assert [batch.numbers.tolist() for batch in drawn] == [[0, 1, 2, 3], [4]]
    assert [batch.labels.tolist() for batch in drawn] == [[7, 2, 4, 7], [2]]
    assert [len(batch.images) for batch in draw(plain, range(3), max_batch=1)] == [1, 1, 1]


def test_prompts_do_not_depend_on_the_batch(plain, monkeypatch):
    """Images take the prompts in turn, as tokens and lengths."""

    def lengths_in_the_noise(model, params, noise, tokens, *, lengths, **settings):
        return jnp.zeros_like(noise) + (100 * lengths + tokens[:, 1])[:, None, None, None]

    monkeypatch.setattr(generation.sampler, "sample", lengths_in_the_noise)
    plain.text.tokenizer, plain.text.length = "drawings", 6
    plain.text.vocabulary = text.open_tokenizer("drawings").vocabulary
    plain.sample.prompts = "a red planet; on pale blue sky ;red"
    drawn = np.concatenate([batch.latents[:, 0, 0, 0] for batch in draw(plain, range(5), devices=2)])
    texts = prompts.tokenize(plain)
    np.testing.assert_array_equal(texts.lengths, [5, 6, 3, 5, 6])
    np.testing.assert_array_equal(drawn, 100 * texts.lengths + texts.tokens[:, 1])


def test_prompts_are_read_from_a_file(plain, tmp_path):
    plain.text.tokenizer, plain.text.length = "drawings", 4
    plain.text.vocabulary = text.open_tokenizer("drawings").vocabulary
    plain.sample.prompts = str(tmp_path / "prompts.txt")
    with pytest.raises(ConfigError, match="prompts.txt' cannot be read"):
        prompts.load(plain)
    (tmp_path / "prompts.txt").write_text("a red planet; and more\n\nblue\n")
    assert prompts.load(plain) == ["a red planet; and more", "blue"] * 2 + ["a red planet; and more"]
    with pytest.raises(ConfigError, match="config.sample.prompts: 'a red planet; and more' is .* tokens long"):
        prompts.tokenize(plain)
    plain.sample.prompts = " ;"
    with pytest.raises(ConfigError, match="holds no prompt"):
        prompts.load(plain)


def test_prompts_are_shown_below_their_images():
    images = np.full((3, 32, 32, 1), 90, np.uint8)
    shown = prompts.add_caption_strips(
        images, ["a red planet", "", "a blue planet with two moons in a black sky, and a star"]
    )
    assert shown.dtype == np.uint8 and shown.shape[:3] == (3, shown.shape[1], 128)
    assert (shown[:, :128] == 90).all()
    dark = [int((row[128:] < 100).sum()) for row in shown]
    assert dark[1] == 0 < dark[0] < dark[2]


def test_seed_and_guidance_are_arguments_of_the_program(plain, noise_only):
    plain.model.classes, plain.sample.guidance = 10, 2.0
    program = generation.make_sample_fn(plain, madformer.build(plain), codec.build(plain).decode)
    mesh = partitioning.make_mesh(1, 1, 1, jax.devices()[:1])
    s, latents, scales = plain.sample, [], []
    values = ((0, 2.0, (0, 999), "constant"), (3, 2.0, (0, 500), "constant"), (3, 1.5, (0, 999), "linear"))
    for plain.seed, s.guidance, s.guidance_interval, s.guidance_schedule in values:
        scales.append(generation.make_inputs(plain, None, None).guidance.tolist())
        latents += [batch.latents for batch in generation.batches(plain, program, {}, {}, mesh, range(2))]
    assert program._cache_size() == 1
    assert np.abs(latents[0] - latents[1]).max() > 1
    assert scales == [[2, 2], [1, 2], [1, 1.5]]  # at t = 999, 499


def test_error_names_image_and_block_of_non_finite_latents(plain, monkeypatch):
    plain.model.blocks = 4

    def non_finite(model, params, noise, tokens, **settings):
        return noise.at[1, 2, 0, 3].set(np.inf)

    monkeypatch.setattr(generation.sampler, "sample", non_finite)
    with pytest.raises(ConfigError, match=r"not finite: image 4 from block 3 on\. .*sample\.guidance=1\.0"):
        draw(plain, [0, 4])
    assert [len(batch.numbers) for batch in draw(plain, [0])] == [1]  # Padding is not checked.


def test_error_names_the_image_of_non_finite_pixels(plain, noise_only):
    pixel = codec.build(plain)
    with pytest.raises(ConfigError, match=r"not finite: the decoder's pixels of image 3\."):
        draw(plain, [2, 3], decode=lambda params, z: pixel.decode(params, z).at[1, 5].set(np.nan))


def test_noise_of_a_file_is_read_by_image_number(plain, noise_only, tmp_path):
    noise = np.random.default_rng(0).normal(size=(5, 1, 64, 16))
    plain.sample.noise = str(tmp_path / "noise.npy")
    np.save(plain.sample.noise, noise)
    drawn = np.concatenate([batch.latents for batch in draw(plain, [3, 0, 4])])
    np.testing.assert_array_equal(codec.to_blocks(drawn, derive_sizes(plain)), noise[[3, 0, 4]].astype(np.float32))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (np.ones((4, 1, 64, 16)), r"shape \(4, 1, 64, 16\): it must be \(5, 1, 64, 16\)"),
        (np.full((5, 1, 64, 16), [np.nan] + [0] * 15), "not finite at image 0"),
        (np.ones((5, 1, 64, 16), complex), "holds complex128"),
        (np.full((5, 1, 64, 16), "a"), "holds <U1"),
        ({"a": np.ones(3)}, "of several arrays"),
        (b"no array", "cannot be read"),
        (b"PK\3\4", "cannot be read"),  # the start of a .npz archive
    ],
)
def test_invalid_noise_is_refused(plain, noise_only, tmp_path, content, complaint):
    path = tmp_path / "noise.npy"
    plain.sample.noise = str(path)
    with path.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            np.savez(file, **content) if isinstance(content, dict) else np.save(file, content)
    with pytest.raises(ConfigError, match=complaint) as error:
        draw(plain, range(5))
    assert "\n" not in str(error.value)


def test_grid_is_about_square_and_padded_with_white():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 2, 3, 1), np.uint8)
    grid = generation.tile_grid(images)
    assert grid.shape == (4, 9, 1)
    np.testing.assert_array_equal(grid[::2, ::3, 0], [[0, 1, 2], [3, 4, 255]])
    np.testing.assert_array_equal(generation.tile_grid(images[:1])[..., 0], images[0, ..., 0])


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_is_scaled_down_to_the_maximum_width(channels):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 12, channels), np.uint8)
    small = generation.downscale_for_grid(images, 12)  # three columns of 12 pixels
    assert small.shape == (5, 3, 4, channels)
    assert generation.tile_grid(small).shape == (6, 12, channels)
    expected = images[:, :6].reshape(5, 2, 3, 4, 3, channels).mean((2, 4))
    np.testing.assert_allclose(small[:, :2], expected, atol=0.6)
    np.testing.assert_array_equal(generation.downscale_for_grid(images, 36), images)


@pytest.mark.parametrize("name", ["a[1]", "x*"])
def test_shards_are_read_from_folders_with_glob_characters(tmp_path, name):
    for value, folder in enumerate(("a1", "xy", name)):
        shard = generation.SampleBatch(*[np.full(1, value)] * len(generation.SampleBatch._fields))
        generation.write_shard(tmp_path / folder / "shard-00000-of-00001.npz", shard)
    (shard,) = generation.read_shards(tmp_path / name)
    assert shard.images.tolist() == [2]


def test_flipped_bits_of_a_shard_are_detected(tmp_path):
    path = tmp_path / "shard.npz"
    rng = np.random.default_rng(0)
    shard = generation.SampleBatch(
        np.arange(2),
        np.zeros(2, np.int32),
        rng.integers(0, 256, (2, 4, 4, 1), np.uint8),
        np.ones((2, 2, 2, 4), np.float32),
    )
    generation.write_shard(path, shard)
    content, detected = path.read_bytes(), 0
    jax.tree.map(np.testing.assert_array_equal, generation.read_shard(path), shard)
    for i in range(0, len(content), 5):
        path.write_bytes(content[:i] + bytes([content[i] ^ 16]) + content[i + 1 :])
        try:
            # Some bits, such as those of dates, do not matter.
            jax.tree.map(np.testing.assert_array_equal, generation.read_shard(path), shard)
        except generation.DamagedError:
            detected += 1
    assert detected > 100
    assert generation.read_shard(tmp_path / "none.npz") is None


def test_random_labels_do_not_depend_on_the_batch(plain, noise_only):
    plain.model.classes, plain.sample.label_sampling = 10, "random"
    few = np.concatenate([batch.labels for batch in draw(plain, range(5))])
    (many,) = draw(plain, [4, 1, 3], devices=4, max_batch=4)
    np.testing.assert_array_equal(many.labels, few[[4, 1, 3]])
    assert few.tolist() != [0, 1, 2, 3, 4]
