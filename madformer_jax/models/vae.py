"""AutoencoderKL, the image <-> latent network of Stable Diffusion, in channels-last layout.

Module names follow diffusers', so that a parameter's path is its name in a diffusers checkpoint. Latents here are those
of the network itself; `codec` multiplies them by `scaling_factor`.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from madformer_jax import partitioning, weights
from madformer_jax.codec import Codec
from madformer_jax.config import VAE_CHANNELS, VAE_DOWNSAMPLING, ConfigError

Array = jax.Array
Params = Mapping[str, Any]

SCALING_FACTOR = 0.18215  # of Stable Diffusion: makes the latents' variance about 1
EPS = 1e-6  # of every GroupNorm

# attention scores held at once, 64 MiB: a 512 x 512 image is done in one go, 1024 x 1024 in 16 chunks of queries
MAX_SCORES = 2**24
# pixels a pass of `encode` and `decode`: the activations of one 1024 x 1024 image fit 8 GiB in float32
MAX_PIXELS = 1024 * 1024


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, conv3x3, twice, beside a shortcut that is a 1x1 convolution where the channels differ."""

    channels: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = _norm(self.groups, self.dtype, "norm1")(x)
        h = _conv(self.channels, self.dtype, "conv1")(nn.silu(h))
        h = _norm(self.groups, self.dtype, "norm2")(h)
        h = _conv(self.channels, self.dtype, "conv2")(nn.silu(h))
        if x.shape[-1] != self.channels:
            x = _conv(self.channels, self.dtype, "conv_shortcut", size=1)(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over all positions, one head; exact for any size without a positions x positions matrix."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape

        def dense(name: str) -> nn.Dense:
            return nn.Dense(channels, dtype=self.dtype, name=name)

        h = _norm(self.groups, self.dtype, "group_norm")(x).reshape(batch, height * width, channels)
        q, k, v = dense("to_q")(h), dense("to_k")(h), dense("to_v")(h)  # (B, S, C)

        def attend(query: Array) -> Array:  # (B, C): one position of every image
            scores = jnp.einsum("bc,bkc->bk", query, k, preferred_element_type=jnp.float32)
            return jnp.einsum("bk,bkc->bc", jax.nn.softmax(scores * channels**-0.5).astype(v.dtype), v)

        queries = max(1, MAX_SCORES // (batch * height * width))
        h = jax.lax.map(attend, q.swapaxes(0, 1), batch_size=queries).swapaxes(0, 1)
        return x + dense("to_out_0")(h).reshape(x.shape)


class Stage(nn.Module):
    """ResNet blocks of one resolution, then a convolution that halves or doubles it."""

    channels: int
    layers: int
    groups: int
    resample: str  # "down", "up" or ""
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.layers):
            x = ResnetBlock(self.channels, self.groups, self.dtype, name=f"resnets_{i}")(x)
        if self.resample == "down":
            x = Downsample(self.channels, self.dtype, name="downsamplers_0")(x)
        if self.resample == "up":
            x = Upsample(self.channels, self.dtype, name="upsamplers_0")(x)
        return x


class Downsample(nn.Module):
    """3x3 convolution with stride 2, padded below and on the right only."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        padding = ((0, 1), (0, 1))
        return nn.Conv(self.channels, (3, 3), strides=2, padding=padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Every pixel as a square of four, then a 3x3 convolution."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return _conv(self.channels, self.dtype, "conv")(x.repeat(2, axis=1).repeat(2, axis=2))


class MidBlock(nn.Module):
    """ResNet block, attention, ResNet block at the lowest resolution."""

    channels: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ResnetBlock(self.channels, self.groups, self.dtype, name="resnets_0")(x)
        x = Attention(self.groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(self.channels, self.groups, self.dtype, name="resnets_1")(x)


class Encoder(nn.Module):
    """Images to the mean and log-variance channels, before quant_conv."""

    channels: tuple[int, ...]  # of the stages, from full resolution down
    out_channels: int
    layers: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _conv(self.channels[0], self.dtype, "conv_in")(x)
        for i, channels in enumerate(self.channels):
            resample = "down" if i < len(self.channels) - 1 else ""
            x = Stage(channels, self.layers, self.groups, resample, self.dtype, name=f"down_blocks_{i}")(x)
        x = MidBlock(self.channels[-1], self.groups, self.dtype, name="mid_block")(x)
        x = nn.silu(_norm(self.groups, self.dtype, "conv_norm_out")(x))
        return _conv(self.out_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """Latents after post_quant_conv to images."""

    channels: tuple[int, ...]  # of the stages, from full resolution down
    out_channels: int
    layers: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, z: Array) -> Array:
        x = _conv(self.channels[-1], self.dtype, "conv_in")(z)
        x = MidBlock(self.channels[-1], self.groups, self.dtype, name="mid_block")(x)
        for i, channels in enumerate(reversed(self.channels)):
            resample = "up" if i < len(self.channels) - 1 else ""
            x = Stage(channels, self.layers, self.groups, resample, self.dtype, name=f"up_blocks_{i}")(x)
        x = nn.silu(_norm(self.groups, self.dtype, "conv_norm_out")(x))
        return _conv(self.out_channels, self.dtype, "conv_out")(x)


class AutoencoderKL(nn.Module):
    """The Stable Diffusion VAE, 83.65 M parameters by default; fields are named as in diffusers' config.json.

    Attributes:
      dtype: of the computation; parameters, GroupNorm's statistics, attention scores and results are float32.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = SCALING_FACTOR
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        channels, layers, groups = tuple(self.block_out_channels), self.layers_per_block, self.norm_num_groups
        self.encoder = Encoder(channels, 2 * self.latent_channels, layers, groups, self.dtype)
        self.decoder = Decoder(channels, self.out_channels, layers + 1, groups, self.dtype)
        self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    @property
    def reduction(self) -> int:
        """Pixels along a latent position's side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """Images (B, H, W, c) in [-1, 1] to the posterior's mean and log-variance, (B, H/8, W/8, C) each, float32."""
        mean, logvar = jnp.split(self.quant_conv(self.encoder(images)).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)  # bounds of diffusers: keep the variance finite

    def decode(self, z: Array) -> Array:
        """Unscaled latents (B, h, w, C) to images (B, 8 h, 8 w, c), float32, about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)

    def __call__(self, images: Array) -> Array:
        """Images decoded from their own posterior's mean; touches every parameter."""
        return self.decode(self.encode(images)[0])


def _norm(groups: int, dtype: jnp.dtype, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=EPS, dtype=dtype, name=name)


def _conv(channels: int, dtype: jnp.dtype, name: str, size: int = 3) -> nn.Conv:
    return nn.Conv(channels, (size, size), padding=size // 2, dtype=dtype, name=name)


# ---- whole batches


def encode(model: AutoencoderKL, params: Params, images: Array, at_once: int | None = None) -> tuple[Array, Array]:
    """`AutoencoderKL.encode` of any batch, on each device at most `at_once` images at a time; pure and jittable.

    By default as many as `MAX_PIXELS` holds.
    """
    at_once = at_once or max(1, MAX_PIXELS // (images.shape[1] * images.shape[2]))
    return _in_passes(lambda x: model.apply({"params": params}, x, method="encode"), images, at_once)


def decode(model: AutoencoderKL, params: Params, z: Array, at_once: int | None = None) -> Array:
    """`AutoencoderKL.decode` of any batch, on each device at most `at_once` images at a time; pure and jittable.

    By default as many as `MAX_PIXELS` holds: one 1024 x 1024 image takes 4.6 GiB in float32.
    """
    at_once = at_once or max(1, MAX_PIXELS // (z.shape[1] * z.shape[2] * model.reduction**2))
    return _in_passes(lambda x: model.apply({"params": params}, x, method="decode"), z, at_once)


def _in_passes(f: Callable[[Array], Any], x: Array, at_once: int) -> Any:
    """f(x) by a loop over equal parts of the batch, each of which takes as many rows from every device."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.gcd(len(x), 1 if mesh.empty else partitioning.batch_devices(mesh))
    rows = len(x) // devices
    share = max(n for n in range(1, min(at_once, rows) + 1) if rows % n == 0)
    if share == rows:
        return f(x)
    passes = rearrange(x, "(d p s) ... -> p (d s) ...", d=devices, s=share)
    passes = nn.with_logical_constraint(passes, (None, "batch") + (None,) * (x.ndim - 1))
    return jax.tree.map(lambda y: rearrange(y, "p (d s) ... -> (d p s) ...", d=devices), jax.lax.map(f, passes))


def sample(mean: Array, logvar: Array, key: Array) -> Array:
    """Draws latents from the posterior, unscaled, float32; mean and logvar are of one shape and any float type."""
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)


def codec(path: str, dtype: str) -> Codec:
    """Image <-> latent of the model, scaled, with weights from wherever `load` finds them.

    Raises:
      ConfigError: no weights there, they do not fit, or the network is of another kind than Stable Diffusion's.
    """
    model, params = load(path, dtype)
    if (model.reduction, model.latent_channels) != (VAE_DOWNSAMPLING, VAE_CHANNELS):
        raise ConfigError(
            f"config.codec.path={path!r} has {model.latent_channels} latent channels at 1/{model.reduction} of the "
            f"side; a VAE with {VAE_CHANNELS} at 1/{VAE_DOWNSAMPLING} is needed."
        )

    return as_codec(model, params)


def as_codec(model: AutoencoderKL, params: Params) -> Codec:
    """The codec of a network and its weights, or their abstract shapes."""

    def encode_batch(params: Params, batch: Mapping[str, Array], key: Array) -> Array:
        cached = "mean" in batch
        mean, logvar = (batch["mean"], batch["logvar"]) if cached else encode(model, params, batch["image"])
        return model.scaling_factor * sample(mean, logvar, key)

    def decode_batch(params: Params, z: Array) -> Array:
        return decode(model, params, z / model.scaling_factor)

    return Codec(params, encode_batch, decode_batch)


# ---- files

_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def load(path: str, dtype: str | jnp.dtype = jnp.float32) -> tuple[AutoencoderKL, Params]:
    """Model and parameters from a diffusers folder, a folder written by `save`, or a Hugging Face hub id.

    Raises:
      ConfigError: there is nothing of the kind at `path`, the hub cannot be reached, or the tensors do not fit.
    """
    model, params, _ = _load(path, dtype)
    return model, params


def save(path: str, source: str) -> None:
    """Writes the VAE at `source` (as for `load`) as an Orbax folder, config.json last.

    Raises:
      ConfigError: as for `load`; nothing is written then.
    """
    _, params, config = _load(source, jnp.float32)
    weights.save_params(path, params)
    (epath.Path(path) / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _load(path: str, dtype: str | jnp.dtype) -> tuple[AutoencoderKL, Params, dict[str, Any]]:
    if not path:
        raise ConfigError(
            "config.codec.path is empty: give the VAE's folder or hub id (such as stabilityai/sd-vae-ft-mse)."
        )
    folder = epath.Path(path)
    if folder.is_dir():
        files = [folder / name for name in _FILES if (folder / name).exists()]
        config_file = folder / "config.json"
        if not config_file.exists() or not (files or weights.has_params(path)):
            raise ConfigError(f"{path} is no VAE folder: it needs config.json and one of {', '.join(_FILES)}.")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        config_file, *files = _download(path)
    else:
        raise ConfigError(f"{path}: no such folder, and no hub id either (owner/name).")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise ConfigError(f"{config_file} is no JSON ({error}).") from None
    model = from_config(config, dtype)
    if files:
        state_dict = weights.read_state_dict(files[0]).tensors
        return model, from_diffusers_vae(state_dict, model, str(files[0])), config
    params = weights.load_params(path)
    weights.check_tensors(shapes(model), to_diffusers_vae(params), path)
    return model, params, config


def _download(hub_id: str) -> list[epath.Path]:
    """config.json and the weights of a hub repository, in the hub's own cache."""
    what = f"VAE {hub_id!r} is no folder, and as a hub id it cannot be downloaded"
    instead = "download the folder by other means and give its path"
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(f"{what}: pip install huggingface_hub, or {instead}.") from None
    problem: Exception | None = None
    for name in _FILES:
        try:
            return [epath.Path(huggingface_hub.hf_hub_download(hub_id, file)) for file in ("config.json", name)]
        except Exception as error:  # of the hub, the HTTP library below it or the system
            problem = problem or error
    reason = str(problem).strip().split("\n")[0] or type(problem).__name__
    raise ConfigError(f"{what} ({reason}): {instead}.")


# ---- conversion

_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.15


def from_config(config: Mapping[str, Any], dtype: str | jnp.dtype = jnp.float32) -> AutoencoderKL:
    """The model of a diffusers config.json.

    Raises:
      ConfigError: it asks for something that the Stable Diffusion VAE does not have.
    """
    known = {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * len(config.get("block_out_channels", (0,) * 4)),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.get("block_out_channels", (0,) * 4)),
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "shift_factor": None,
    }
    for name, value in known.items():
        if name in config and config[name] != value:
            raise ConfigError(f"VAE config {name}={config[name]!r} is not supported: only {value!r}.")
    fields = [
        name
        for name in AutoencoderKL.__dataclass_fields__
        if name in config and name not in ("dtype", "name", "parent")
    ]
    values = {name: tuple(config[name]) if isinstance(config[name], list) else config[name] for name in fields}
    return AutoencoderKL(**values, dtype=jnp.dtype(dtype))


def shapes(model: AutoencoderKL) -> dict[str, tuple[int, ...]]:
    """The diffusers state_dict of `model`: name -> shape in PyTorch's layout."""
    tree = jax.eval_shape(model.init, jax.random.key(0), _smallest_image(model))["params"]
    return {_name(path): _torch_shape(leaf.shape) for path, leaf in flatten_dict(tree).items()}


def from_diffusers_vae(state_dict: Mapping[str, np.ndarray], model: AutoencoderKL, what: str = "VAE") -> dict[str, Any]:
    """Parameters (float32 numpy) of `model` from a diffusers state_dict, with the attention's old or new names.

    Raises:
      ConfigError: names every tensor that is missing, left over or mis-shaped; `what` names the file there.
    """
    given = {}
    for name, tensor in state_dict.items():
        head, _, kind = name.rpartition(".")
        parent, _, layer = head.rpartition(".")
        if parent.endswith("attentions.0"):
            name = f"{parent}.{_OLD_NAMES.get(layer, layer)}.{kind}"
            if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):  # older still: 1x1 convolutions
                tensor = tensor[:, :, 0, 0]
        given[name] = tensor
    weights.check_tensors(shapes(model), given, what)
    tree = jax.eval_shape(model.init, jax.random.key(0), _smallest_image(model))["params"]
    flat = {path: _from_torch(np.asarray(given[_name(path)], np.float32)) for path in flatten_dict(tree)}
    return unflatten_dict(flat)


def to_diffusers_vae(params: Params) -> dict[str, np.ndarray]:
    """The diffusers state_dict (new attention names) of parameters: the inverse of `from_diffusers_vae`."""
    return {_name(path): _to_torch(np.asarray(leaf)) for path, leaf in flatten_dict(params).items()}


def _smallest_image(model: AutoencoderKL) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, model.reduction, model.reduction, model.in_channels), jnp.float32)


def _name(path: tuple[str, ...]) -> str:
    """encoder/down_blocks_0/resnets_1/conv1/kernel -> encoder.down_blocks.0.resnets.1.conv1.weight"""
    kind = {"kernel": "weight", "scale": "weight", "bias": "bias"}[path[-1]]
    return ".".join([re.sub(r"_(\d+)$", r".\1", part) for part in path[:-1]] + [kind])


def _from_torch(tensor: np.ndarray) -> np.ndarray:
    """Convolution (out, in, h, w) -> (h, w, in, out), linear (out, in) -> (in, out)."""
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _to_torch(tensor: np.ndarray) -> np.ndarray:
    return tensor.transpose(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return _to_torch(np.broadcast_to(np.float32(0), shape)).shape
