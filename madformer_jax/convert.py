"""Weights of PyTorch checkpoints to ours and back, every tensor accounted for (--mode=convert).

python -m madformer_jax.main --mode=convert --config.convert.release=0210000.pt --workdir=runs/release
"""

import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from madformer_jax import checkpoint, weights
from madformer_jax import config as config_lib
from madformer_jax.config import ConfigError
from madformer_jax.models import inception, madformer, vae
from madformer_jax.weights import check_tensors

_TOWERS = {"tower_clean": 0, "tower_pred": 1}
_TOWER = {  # ours -> the release's, in a decoder layer; {t} is the number of the tower
    "attention_norm": "input_layernorm_list.{t}",
    "query": "self_attn.qkv_list.{t}",  # the release holds query, key and value as one matrix
    "key": "self_attn.qkv_list.{t}",
    "value": "self_attn.qkv_list.{t}",
    "query_norm": "self_attn.q_norm_list.{t}",
    "key_norm": "self_attn.k_norm_list.{t}",
    "out": "self_attn.proj_list.{t}",
    "mlp_norm": "post_attention_layernorm_list.{t}",
    "gate": "mlp_list.{t}.gate_proj",
    "up": "mlp_list.{t}.up_proj",
    "down": "mlp_list.{t}.down_proj",
}
_QKV = ("query", "key", "value")
_UNET = {  # ours -> the release's, in a ResNet or attention block
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
}
_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}


class _Source(NamedTuple):
    """Where one of our leaves comes from: a tensor for each layer it is stacked over, and which third of it."""

    names: tuple[str, ...]
    part: int | None  # 0, 1, 2: query, key, value of a joint matrix; None: all of it
    stacked: bool


def _source(path: tuple[str, ...], shape: tuple[int, ...], depth: int, diffusion_depth: int) -> _Source:
    """The release's tensors behind the leaf at `path` of our parameters."""
    if path == ("boi",):
        return _Source(("boi_block",), None, False)
    leaf = _LEAF[path[-1]]
    if path[0] in ("ar_layers", "diffusion_layers"):
        first, count = (
            (0, depth - diffusion_depth) if path[0] == "ar_layers" else (depth - diffusion_depth, diffusion_depth)
        )
        layers = range(first, first + count - 1) if path[1] == "body" else [first + count - 1]
        name = _TOWER[path[3]].format(t=_TOWERS[path[2]])
        part = _QKV.index(path[3]) if path[3] in _QKV else None
        return _Source(tuple(f"blocks.{layer}.{name}.{leaf}" for layer in layers), part, path[1] == "body")
    sampler, side = path[0], "down" if path[0] == "downsampler" else "up"
    module = path[1]
    if module in ("conv_in", "conv_out"):
        name = module
    elif module == "time":
        name = f"time_embedding.{path[2]}"
    elif match := re.fullmatch(r"(resnet|attention)_(\d+)_(\d+)", module):
        kind, stage, index = match.groups()
        name = f"{side}_blocks.{stage}.{kind}s.{index}.{_UNET[path[2]]}"
    else:  # down_0, up_0: the convolution between two stages
        stage = module.split("_")[1]
        name = f"{side}_blocks.{stage}.{sampler}s.0.conv"
    return _Source((f"{sampler}.{name}.{leaf}",), None, False)


def _to_torch(leaf: np.ndarray, name: str) -> np.ndarray:
    """Our layout of one tensor to PyTorch's: HWIO to OIHW, (in, out) to (out, in), BOI with a batch axis."""
    if name == "boi_block":
        return leaf[None]
    return leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T


def _from_torch(tensor: np.ndarray, name: str) -> np.ndarray:
    if name == "boi_block":
        return tensor[0]
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _layout(c: ConfigDict) -> dict[tuple[str, ...], tuple[tuple[int, ...], _Source]]:
    """Our parameters' paths with their shapes and sources.

    Raises:
      ConfigError: the release has no such model.
    """
    if c.model.classes or c.model.param_sets != "separate":
        raise ConfigError(
            "the release's weights have no text tower and no shared towers: model.classes must be 0 and "
            "model.param_sets 'separate'."
        )
    return _layout_of(c.to_json())


@functools.lru_cache(maxsize=1)  # tracing the model takes a second or two
def _layout_of(config: str) -> dict[tuple[str, ...], tuple[tuple[int, ...], _Source]]:
    model = madformer.build(ConfigDict(json.loads(config)))
    params = nn.meta.unbox(jax.eval_shape(lambda key: madformer.init(model, key), jax.random.key(0)))
    depths = model.depth, model.diffusion_depth
    return {path: (leaf.shape, _source(path, leaf.shape, *depths)) for path, leaf in flatten_dict(params).items()}


def _expected(layout: Mapping[tuple[str, ...], tuple[tuple[int, ...], _Source]]) -> dict[str, tuple[int, ...]]:
    """The release's names and shapes of a layout."""
    shapes: dict[str, tuple[int, ...]] = {}
    for shape, source in layout.values():
        for name in source.names:
            leaf = np.broadcast_to(np.float32(0), shape[1:] if source.stacked else shape)  # no memory behind it
            torch_shape = _to_torch(leaf, name).shape
            shapes[name] = torch_shape if source.part is None else (3 * torch_shape[0], *torch_shape[1:])
    return shapes


def release_shapes(config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the release's state_dict for a config.

    Raises:
      ConfigError: the release has no such model.
    """
    return _expected(_layout(config))


def from_release(
    state_dict: Mapping[str, np.ndarray], config: ConfigDict, what: str = "the release's weights"
) -> dict[str, Any]:
    """Parameters for `config` (see `config.release`) from a state_dict of the PyTorch release, name -> array.

    Without the clean stream the clean towers (`*_list.0.*`), which that variant of the release carries but never runs,
    are left out.

    Raises:
      ConfigError: tensors are missing, left over or of another shape; each is named, with `what` before them.
    """
    layout = _layout(config)
    if not config.model.clean_stream:
        state_dict = {name: x for name, x in state_dict.items() if "_list.0." not in name}
    check_tensors(_expected(layout), state_dict, what)

    def leaf(source: _Source) -> np.ndarray:
        tensors = [np.asarray(state_dict[name], np.float32) for name in source.names]
        if source.part is not None:
            tensors = [np.split(x, 3)[source.part] for x in tensors]
        parts = [_from_torch(x, name) for x, name in zip(tensors, source.names, strict=True)]
        # always a copy: one view would keep the whole mapped file in memory
        return np.stack(parts) if source.stacked else np.array(parts[0], order="C")

    return unflatten_dict({path: leaf(source) for path, (_, source) in layout.items()})


def to_release(params: Mapping[str, Any], config: ConfigDict) -> dict[str, np.ndarray]:
    """The release's state_dict for parameters of `config`; the inverse of `from_release`.

    Without the clean stream the clean towers, which that variant never runs, are written as copies of the noisy ones.

    Raises:
      ConfigError: the release has no such model, or the parameters are not those of `config`.
    """
    layout = _layout(config)
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(dict(params)).items()}
    check_tensors(
        {"/".join(path): shape for path, (shape, _) in layout.items()},
        {"/".join(path): leaf for path, leaf in flat.items()},
        "the parameters",
    )
    parts: dict[str, dict[int | None, np.ndarray]] = {}
    for path, (_, source) in layout.items():
        leaves = flat[path] if source.stacked else flat[path][None]
        for name, x in zip(source.names, leaves, strict=True):
            parts.setdefault(name, {})[source.part] = _to_torch(x, name)
    state_dict = {
        name: np.ascontiguousarray(p[None] if None in p else np.concatenate([p[0], p[1], p[2]]))
        for name, p in parts.items()
    }
    if not config.model.clean_stream:
        state_dict |= {name.replace("_list.1.", "_list.0."): x for name, x in state_dict.items() if "_list.1." in name}
    return state_dict


# ---- --mode=convert

RELEASE_VAE = "stabilityai/sd-vae-ft-mse"


def run(c: ConfigDict, workdir: str) -> None:
    """--mode=convert: one of the files that `config.convert` names.

    release: the release's checkpoint to a workdir that --mode=sample takes; its model is that of the file's arguments, and
      of the given config where the file has none.
    vae, inception: to the Orbax folders workdir/vae (for `config.codec.path`) and workdir/inception.
    to_release: the workdir's newest checkpoint to a file that the release's code loads.

    Raises:
      ConfigError: a file cannot be read or a tensor does not fit; nothing is written then.
    """
    jobs = {"release": _release, "vae": _vae, "inception": _inception, "to_release": _to_release_file}
    chosen = [name for name in jobs if c.convert[name]]
    if len(chosen) != 1:
        given = ", ".join(chosen) or "none"
        raise ConfigError(f"--mode=convert needs one of config.convert.{{{','.join(jobs)}}}, given: {given}.")
    jobs[chosen[0]](c, workdir)


def release_config(tensors: Mapping[str, np.ndarray], args: Mapping[str, Any], codec_path: str = "") -> ConfigDict:
    """The config of a release checkpoint.

    Args:
      tensors: its state_dict. The sizes that the release reads from a JSON file of its own follow from the shapes.
      args: its training arguments. With an `image_size` in them, the model is for images behind the release's VAE.
      codec_path: the VAE to use in place of the one on the hub; with it, the model is for images as well.

    Raises:
      ConfigError: a tensor or an argument is missing, or the model is one that we do not have.
    """
    if args.get("patch_size", 1) != 1 or not args.get("square_block", True):
        raise ConfigError("the release's arguments have patch_size other than 1 or square_block=False: not supported.")
    renamed = {"lambda_hidden_loss": "lambda_hidden", "vae_latent_size": "latent_channels"}
    try:
        sizes = _sizes(tensors)
    except KeyError as error:
        raise ConfigError(f"no checkpoint of the release: {error.args[0]} is missing.") from None
    c = config_lib.release(sizes | {renamed.get(name, name): value for name, value in args.items()})
    if codec_path or "image_size" in args:
        c.codec.name, c.codec.path = "vae", codec_path or RELEASE_VAE
        c.data.image_size, c.data.channels = c.data.image_size * config_lib.VAE_DOWNSAMPLING, 3
    return c


def _sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the shapes say of the release's sizes; group and head counts of the U-Net, which they do not, as released."""

    def count(pattern: str) -> int:
        return len({match[0] for name in tensors if (match := re.match(pattern, name))})

    stages = range(count(r"downsampler\.down_blocks\.\d+\."))
    stage = "downsampler.down_blocks"
    width = tensors["boi_block"].shape[-1]
    return {
        "hidden_size": width,
        "num_heads": width // tensors["blocks.0.self_attn.q_norm_list.1.weight"].shape[0],
        "depth": count(r"blocks\.\d+\."),
        "intermediate_size": tensors["blocks.0.mlp_list.1.gate_proj.weight"].shape[0],
        "unet_block_out_channels": [tensors[f"{stage}.{i}.resnets.0.conv1.weight"].shape[0] for i in stages],
        "unet_num_layers_per_block": [count(rf"downsampler\.down_blocks\.{i}\.resnets\.\d+\.") for i in stages],
        "unet_transformer_layers_per_block": [
            min(1, count(rf"downsampler\.down_blocks\.{i}\.attentions\.\d+\.")) for i in stages
        ],
        "unet_time_emb_dim": tensors["downsampler.time_embedding.linear_1.weight"].shape[0],
        "unet_resnet_groups": 8,
        "unet_num_heads": 8,
        "latent_channels": tensors["downsampler.conv_in.weight"].shape[1],
    }


def release_args(c: ConfigDict) -> dict[str, Any]:
    """The release's arguments for a config: the inverse of `config.release`, with what the release's scripts read besides.

    Raises:
      ConfigError: the release has no such model; the settings in which it differs are named.
    """
    m, sizes = c.model, config_lib.sizes(c)
    stages = len(m.unet_channels)
    args = {
        "hidden_size": m.width,
        "num_heads": m.heads,
        "depth": m.depth,
        "diff_depth": m.diffusion_depth,
        "intermediate_size": m.mlp_width,
        "unet_block_out_channels": list(m.unet_channels),
        "unet_num_layers_per_block": [m.unet_layers] * stages,
        "unet_transformer_layers_per_block": [int(attention) for attention in m.unet_attention],
        "unet_resnet_groups": m.unet_groups,
        "unet_num_heads": m.unet_heads,
        "unet_time_emb_dim": m.unet_time_width,
        "block_size": sizes.tokens,
        "pre_downsample_block_size": sizes.positions,
        "ar_len": sizes.blocks,
        "spatial_len": sizes.blocks * sizes.tokens,
        "latent_channels": sizes.channels,
        "vae_latent_size": sizes.channels,
        "patch_size": 1,
        "square_block": True,
        "clear_clean": not m.clean_stream,
        "clear_cond": not m.ar_condition,
        "denoising_mlp": m.diffusion_attention == "block",
        "lambda_hidden": c.loss.hidden,
        "lambda_hidden_loss": c.loss.hidden,
        "model_config_path": None,
    } | ({"image_size": c.data.image_size} if c.codec.name == "vae" else {})
    free = {"attention", "dtype", "remat", "scan_unroll", "hidden_from"}  # how it is computed or trained
    theirs = config_lib.release(args).model
    different = [
        f"model.{name}={m[name]!r} (release: {theirs[name]!r})"
        for name in sorted(m)
        if name not in free and m[name] != theirs[name]
    ]
    if different:
        raise ConfigError(f"the release's code cannot run this model: {', '.join(different)}.")
    return args


def _release(c: ConfigDict, workdir: str) -> None:
    path = c.convert.release
    if checkpoint.exists(workdir):
        raise ConfigError(f"--workdir={workdir} already holds a checkpoint: give another one.")
    content = weights.read_state_dict(path, c.convert.weights)
    if content.args is not None:
        try:
            c = release_config(content.tensors, content.args, c.codec.path)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    config_lib.validate(c)
    item = "ema" if content.weights == "ema" else "params"
    c.sample.weights = "ema" if item == "ema" else "raw"
    params = from_release(content.tensors, c, path)
    taken, count = content.weights or "only", len(content.tensors)
    del content  # the file's pages, before the checkpoint's own buffers come
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(0, {item: params}, None, {"converted_from": pathlib.Path(path).name, "weights": taken})
    checkpoint.write_config(c, workdir)
    logging.info("converted the %s weights of %s, %d tensors, to %s", taken, path, count, workdir)


def _to_release_file(c: ConfigDict, workdir: str) -> None:
    checkpoint.require(workdir)
    checkpoint.check_config(c, workdir, sections=("model", "codec"))
    args = release_args(c)
    model = madformer.build(c)
    abstract = nn.meta.unbox(jax.eval_shape(lambda key: madformer.init(model, key), jax.random.key(0)))
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), abstract)
    item = {"model": "params", "ema": "ema", "": "ema" if c.sample.weights == "ema" else "params"}[c.convert.weights]
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        step, restored, _ = checkpoints.restore({item: target})
    state_dict = to_release(restored.pop(item), c)
    weights.write_state_dict(c.convert.to_release, state_dict, args)
    logging.info(
        "wrote the %s weights of step %d, %d tensors, to %s", item, step, len(state_dict), c.convert.to_release
    )


def _vae(c: ConfigDict, workdir: str) -> None:
    folder = f"{workdir}/vae"
    vae.save(folder, c.convert.vae)
    logging.info("converted %s; use it with --config.codec.path=%s", c.convert.vae, folder)


def _inception(c: ConfigDict, workdir: str) -> None:
    folder = f"{workdir}/inception"
    inception.save(folder, c.convert.inception)
    logging.info("converted %s to %s", c.convert.inception, folder)
