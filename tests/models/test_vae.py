"""The VAE against diffusers' AutoencoderKL, and its memory at full size."""

import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madformer_jax import config
from madformer_jax.config import ConfigError
from madformer_jax.models import vae

REFERENCE = pathlib.Path(__file__).parent.parent / "reference"


def seeded(shapes, gain):
    """Weights by the rule of the reference arrays: a function of each tensor's name and shape."""
    state = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        x = rng.standard_normal(shape)
        if len(shape) > 1:
            x *= np.sqrt(gain / np.prod(shape[1:]))
        else:
            x = 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
        state[name] = x.astype(np.float32)
    return state


def distance(x, reference):
    return np.linalg.norm(np.asarray(x) - reference) / np.linalg.norm(reference)


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def arrays():
    with np.load(REFERENCE / "sd_vae_small.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def small(arrays):
    model = vae.from_config(json.loads(str(arrays["config"])))
    state = seeded(json.loads((REFERENCE / "sd_vae_small_state_dict.json").read_text()), 1.0)
    return model, state, vae.from_diffusers_vae(state, model)


def test_encoding_and_decoding_equal_diffusers(arrays, small):
    model, _, params = small
    mean, logvar = jax.jit(lambda x: vae.encode(model, params, x))(nhwc(arrays["image"]))
    decoded = jax.jit(lambda z: vae.decode(model, params, z))(nhwc(arrays["mean"]))
    assert distance(mean, nhwc(arrays["mean"])) < 1e-4
    assert distance(logvar, nhwc(arrays["logvar"])) < 1e-4
    assert distance(decoded, nhwc(arrays["decoded"])) < 1e-4


def test_chunked_attention_and_passes_equal_the_whole(arrays, small, monkeypatch):
    model, _, params = small
    z = nhwc(arrays["mean"])
    whole = vae.decode(model, params, z)
    monkeypatch.setattr(vae, "MAX_SCORES", 2 * 96 * 25)  # 25 of 96 queries: a remainder
    np.testing.assert_allclose(vae.decode(model, params, z), whole, atol=1e-5)
    np.testing.assert_allclose(vae.decode(model, params, z, at_once=1), whole, atol=1e-5)
    mean, _ = vae.encode(model, params, nhwc(arrays["image"]), at_once=1)
    assert distance(mean, z) < 1e-4


def test_bfloat16_is_close_and_returns_float32(arrays, small):
    model, _, params = small
    half = model.clone(dtype=jnp.bfloat16)
    decoded = vae.decode(half, params, nhwc(arrays["mean"]))
    assert decoded.dtype == jnp.float32
    assert 1e-4 < distance(decoded, nhwc(arrays["decoded"])) < 0.05


def test_sampling_follows_the_posterior():
    mean, logvar = jnp.full((200, 8, 8, 4), 3.0, jnp.float16), jnp.full((200, 8, 8, 4), -2.0, jnp.float16)
    z = vae.sample(mean, logvar, jax.random.key(0))
    assert z.dtype == jnp.float32
    assert abs(z.mean() - 3) < 0.01
    assert abs(z.std() - np.exp(-1)) < 0.01


def test_full_model_takes_exactly_the_published_names_and_shapes():
    reference = json.loads((REFERENCE / "sd_vae_state_dict.json").read_text())
    model = vae.from_config(reference["config"])
    assert vae.shapes(model) == {name: tuple(shape) for name, shape in reference["shapes"].items()}
    assert model == vae.AutoencoderKL()
    assert model.scaling_factor == reference["scaling_factor"] == vae.SCALING_FACTOR
    assert (model.reduction, model.latent_channels) == (config.VAE_DOWNSAMPLING, config.VAE_CHANNELS)


def test_conversion_there_and_back_keeps_every_bit(small):
    model, state, params = small
    back = vae.to_diffusers_vae(params)
    assert back.keys() == state.keys() == vae.shapes(model).keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(back[name], tensor)


@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_names_of_the_attention_are_understood(small, as_convolution):
    model, state, params = small
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in state.items():
        for new_name, old_name in old_names.items():
            if f"attentions.0.{new_name}." in name:
                name = name.replace(new_name, old_name)
                tensor = tensor[..., None, None] if as_convolution and tensor.ndim == 2 else tensor
        old[name] = tensor
    assert old.keys() != state.keys()
    converted = vae.from_diffusers_vae(old, model)
    assert jax.tree.all(jax.tree.map(np.array_equal, converted, params))


def test_wrong_tensors_are_all_named(small):
    model, state, _ = small
    wrong = dict(state)
    del wrong["quant_conv.bias"]
    wrong["decoder.conv_in.weight"] = wrong["decoder.conv_in.weight"][:, :3]
    wrong["loss.logvar"] = np.zeros(1)
    with pytest.raises(ConfigError) as error:
        vae.from_diffusers_vae(wrong, model, "some.bin")
    for word in ("some.bin", "quant_conv.bias", "decoder.conv_in.weight", "(64, 3, 3, 3)", "loss.logvar"):
        assert word in str(error.value)


def test_unsupported_config_is_refused():
    with pytest.raises(ConfigError, match="down_block_types"):
        vae.from_config({"block_out_channels": [8], "down_block_types": ["AttnDownEncoderBlock2D"]})


def test_decoding_1024_pixels_at_full_size_fits_8_gib():
    model = vae.AutoencoderKL()
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    z = jax.ShapeDtypeStruct((4, 128, 128, 4), jnp.float32)
    memory = jax.jit(lambda p, z: vae.decode(model, p, z)).lower(params, z).compile().memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert needed < 8 * 2**30
