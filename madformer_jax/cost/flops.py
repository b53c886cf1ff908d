"""Analytic FLOPs of a config by component, passes of an image, and peak rates of devices.

A multiply-add counts as 2. The count holds matrix products and convolutions as `models.madformer` and
`diffusion.sampler` compute them, with the streams and passes of `models.plan`. It excludes element-wise
work, products with the zero padding of a convolution, and what `model.remat` recomputes.
`network_flops` counts the U-Net and the VAE.

`modes.train` reports the MFU from `training_step`. Results hold the `image_cost` of sampling.
`--mode=compile` and `--mode=benchmark` use both. A new layer needs its FLOPs and a case in
tests/cost/test_flops.py. A new device needs a line in `_PEAK_RATES`.
"""

import dataclasses
import functools
import math
import re
import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from madformer_jax.config import block_steps, elastic_depth
from madformer_jax.config.choices import LOSS_TERMS
from madformer_jax.config.shapes import derive_sizes, vocabulary_size
from madformer_jax.cost import network_flops
from madformer_jax.diffusion import solvers
from madformer_jax.models.plan import ablation_switches, sampling_plan, training_plan
from madformer_jax.models.vae import AutoencoderKL, typical_vae


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs by component."""

    ar_layers: float = 0.0  # projections and SwiGLU of the image streams
    diffusion_layers: float = 0.0
    attention: float = 0.0  # scores and weighted values of the image streams, in all layers
    unet: float = 0.0  # down- and upsampler, with their own attention
    vae: float = 0.0
    text: float = 0.0  # everything of the text stream

    @property
    def total(self) -> float:
        return math.fsum(vars(self).values())

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{name: x + getattr(other, name) for name, x in vars(self).items()})

    def __mul__(self, times: float) -> "Cost":
        return Cost(**{name: times * x for name, x in vars(self).items()})


# ---- decoder layers


def _layer_matmuls(c: ConfigDict, tokens: float, keys_only: bool = False) -> float:
    """Returns the FLOPs of the dense layers of one decoder layer, or of its keys and values only."""
    d = c.model.width
    return tokens * (4.0 * d**2 if keys_only else 8.0 * d**2 + 6.0 * d * c.model.mlp_width)


def _text_layer(c: ConfigDict, keys_only: bool) -> float:
    length = c.text.length
    return _layer_matmuls(c, length, keys_only) + (0.0 if keys_only else 4.0 * length**2 * c.model.width)


def _block_attention(c: ConfigDict, block: int, block_only: bool) -> float:
    """Returns the FLOPs of attention of one image block in one layer.

    The block attends to the text, to itself and, unless `block_only`, to the blocks before it.
    """
    s = derive_sizes(c).tokens
    keys = s * (1 if block_only else block + 1) + (c.text.length if vocabulary_size(c) else 0)
    return 4.0 * s * keys * c.model.width


def _stage_cost(c: ConfigDict, name: str, streams: tuple[str, ...], out: tuple[str, ...], clean_blocks: int) -> Cost:
    """Returns the cost of running all blocks of some streams through a stage.

    Args:
      name: "ar_layers" or "diffusion_layers".
      streams: Names of the streams that enter.
      out: Names of the streams that are used afterwards. In the last layer, others need only keys
        and values.
      clean_blocks: Blocks of the clean stream.
    """
    diffusion = name == "diffusion_layers"
    layers = c.model.diffusion_depth if diffusion else c.model.depth - c.model.diffusion_depth
    cost = Cost()
    for stream in streams if layers else ():
        keys_only = stream not in out
        if stream == "text":
            cost += Cost(text=(layers - 1) * _text_layer(c, False) + _text_layer(c, keys_only))
            continue
        blocks = clean_blocks if stream == "clean" else c.model.blocks
        tokens = blocks * derive_sizes(c).tokens
        towers = (layers - 1) * _layer_matmuls(c, tokens) + _layer_matmuls(c, tokens, keys_only)
        scores = sum(
            _block_attention(c, i, diffusion and c.model.diffusion_attention == "block") for i in range(blocks)
        )
        cost += Cost(**{name: towers}, attention=(layers - keys_only) * scores)
    return cost


# ---- programs


def _vae(c: ConfigDict) -> AutoencoderKL:
    return typical_vae(c.codec.latent_channels, c.codec.downsampling)


def forward_pass(c: ConfigDict, terms: tuple[str, ...] | None = None) -> tuple[Cost, float]:
    """Returns the cost of the training forward pass of one image, and the FLOPs of its layers that read data.

    The codec is not included. `terms` are the loss terms, by default those that have a weight.
    """
    m = c.model
    terms = tuple(name for name in LOSS_TERMS if c.loss[name]) if terms is None else terms
    p = training_plan(terms, ablation_switches(c))
    cost = _stage_cost(c, "ar_layers", p.ar_inputs, p.ar_outputs, p.clean_blocks)
    cost += _stage_cost(c, "diffusion_layers", p.diffusion_inputs, p.diffusion_outputs, p.clean_blocks)
    if "text" in p.diffusion_outputs:
        cost += Cost(text=2.0 * c.text.length * m.width * vocabulary_size(c))
    (down, down_first), (up, up_first) = network_flops.downsampler(c), network_flops.upsampler(c)
    downs, ups = m.blocks * len(p.downsampled), m.blocks * len(p.upsampled)
    return cost + Cost(unet=downs * down + ups * up), downs * down_first + ups * up_first


def own_context(c: ConfigDict) -> Cost:
    """Returns the cost of the estimates of `train.own_context` for one image.

    The AR layers run once. The diffusion layers on all streams, and the U-Net on the noisy blocks, run at
    each of `train.own_context_steps`.
    """
    plan, more_steps = training_plan(("image",), ablation_switches(c)), c.train.own_context_steps - 1
    diffusion = _stage_cost(c, "diffusion_layers", plan.diffusion_inputs, plan.diffusion_outputs, plan.clean_blocks)
    unet = Cost(unet=c.model.blocks * (network_flops.downsampler(c)[0] + network_flops.upsampler(c)[0]))
    return forward_pass(c, ("image",))[0] + (diffusion + unet) * more_steps


def training_step(c: ConfigDict, *, encode: bool = True) -> Cost:
    """Returns the cost of one optimizer step of `train.batch` images.

    The backward pass costs twice the forward pass, less the gradients of the data. `train.own_context`
    adds its estimates (`own_context`), whatever the share. With `train.elastic_depth` the cost is the
    mean over the depths that steps draw.

    Args:
      encode: Whether the VAE encodes images in the step. False for cached latents.
    """
    if c.train.elastic_depth:
        depths = elastic_depth.trained_depths(c)
        costs = (training_step(elastic_depth.with_depth(c, depth), encode=encode) for depth in depths)
        return sum(costs, Cost()) * (1 / len(depths))
    cost, first = forward_pass(c)
    cost = cost * 3 + Cost(unet=-first)
    if c.train.own_context:
        cost += own_context(c)
    if encode and c.codec.name == "vae":
        cost += Cost(vae=network_flops.vae_encode(c.data.image_size, _vae(c)))
    return cost * c.train.batch


def sampling(c: ConfigDict, n: int = 1, kept_count: int = 0) -> Cost:
    """Returns the cost of sampling n images with the config's solver steps and guidance.

    The AR layers run once per block, the clean tower once per block except the last, the diffusion layers
    at every evaluation of the solver, and the decoder of the codec once. Both guidance branches run at every evaluation,
    also outside of `guidance_interval`. The first `kept_count` blocks of an edit are embedded and cached only.
    """
    m, stages, diffusion = c.model, sampling_plan(ablation_switches(c)), elastic_depth.sampled_depth(c)
    s, last = derive_sizes(c).tokens, c.model.blocks - 1
    ar, block_only = m.depth - diffusion, m.diffusion_attention == "block"
    cost, unguided = Cost(), Cost()
    down, up = network_flops.downsampler(c)[0], network_flops.upsampler(c)[0]
    if vocabulary_size(c):
        cost += Cost(text=(m.depth - 1) * _text_layer(c, False) + _text_layer(c, True))
    for block, evaluations in enumerate(block_evaluations(c)):
        # The clean tower and the downsampler run on a finished block if anything reads what they return.
        extend_ar, extend_diffusion = (
            block < last and x for x in (stages.cache_clean_ar, stages.cache_clean_diffusion)
        )
        drawn = block >= kept_count
        embedded = block < last and ((stages.condition and block + 1 >= kept_count) or extend_ar)
        # The AR layers: the condition, then the finished block's keys and values.
        runs = (stages.condition and drawn) + extend_ar
        towers, scores = runs * ar * _layer_matmuls(c, s), runs * ar * _block_attention(c, block, False)
        if extend_ar and ar and not extend_diffusion:
            # Only the keys and values of the last AR layer are read.
            towers += _layer_matmuls(c, s, True) - _layer_matmuls(c, s)
            scores -= _block_attention(c, block, False)
        cost += Cost(ar_layers=towers, attention=scores)
        # The diffusion layers: every evaluation, then the finished block. The last layer computes only
        # the keys and values of the latter.
        evaluations = drawn * evaluations
        towers = evaluations * diffusion * _layer_matmuls(c, s)
        scores = evaluations * diffusion * _block_attention(c, block, block_only)
        if extend_diffusion:
            towers += (diffusion - 1) * _layer_matmuls(c, s) + _layer_matmuls(c, s, True)
            scores += (diffusion - 1) * _block_attention(c, block, False)
        cost += Cost(diffusion_layers=towers, attention=scores, unet=evaluations * up)
        unguided += Cost(unet=(evaluations + embedded) * down)
    if c.codec.name == "vae":
        unguided += Cost(vae=network_flops.vae_decode(c.data.image_size, _vae(c)))
    branches = guidance_branches(c)
    return (cost * branches + unguided) * n


def guidance_branches(c: ConfigDict) -> int:
    """Returns the branches of each evaluation: 2 with guidance, else 1.

    The interval and the schedule of guidance skip no branch. With `sample.guide` the second branch is
    another model, and its config gives the cost.
    """
    return 2 if vocabulary_size(c) and c.sample.guidance != 1.0 and not c.sample.guide else 1


def block_evaluations(c: ConfigDict) -> tuple[int, ...]:
    """Returns the evaluations of the network in the solver steps of each block, in each guidance branch."""
    return tuple(map(solvers.make(c.sample.solver).evaluations, block_steps.steps_of_blocks(c)))


def nfe(c: ConfigDict, kept_count: int = 0) -> float:
    """Returns the paper's NFE of an image (section 1).

    It is (N - D) / N + evaluations D / N for each guidance branch, with the mean evaluations of a block.
    The formula ignores the clean tower and the ablation switches. `model_passes` counts all layers that
    run. An edit that keeps the first `kept_count` blocks counts the drawn blocks only.
    """
    m, diffusion = c.model, elastic_depth.sampled_depth(c)
    drawn = block_evaluations(c)[kept_count:]
    layers = len(drawn) * (m.depth - diffusion) + sum(drawn) * diffusion
    return guidance_branches(c) * layers / (m.depth * m.blocks)


def model_passes(c: ConfigDict, kept_count: int = 0) -> float:
    """Returns the full-model passes of an image: decoder layers that run on its blocks, over N L.

    A layer of which only keys and values are used counts as a whole layer. The text runs through the
    layers once, before the first block. It counts in FLOPs only.
    """
    return model_passes_until(c, c.model.blocks - 1, block_steps.steps_of_blocks(c)[-1], kept_count)


def model_passes_until(c: ConfigDict, block: int, step: int, kept_count: int = 0) -> float:
    """Returns the part of `model_passes` that has run after a solver step.

    Args:
      block: Index of the block in the order of generation, from 0, at least `kept_count`.
      step: Number of the solver step, from 1.
      kept_count: Number of kept blocks, which come first. Only the clean tower runs on them.
    """
    m, stages, diffusion = c.model, sampling_plan(ablation_switches(c)), elastic_depth.sampled_depth(c)
    ar, evaluations = m.depth - diffusion, block_evaluations(c)
    done = min(step * solvers.make(c.sample.solver).evaluations_per_step, evaluations[block])
    done += sum(evaluations[kept_count:block])
    # The clean tower extends the cache after every block but the last.
    extension = stages.cache_clean_ar * ar + stages.cache_clean_diffusion * diffusion
    layers = (block - kept_count + 1) * stages.condition * ar + done * diffusion + block * extension
    return guidance_branches(c) * layers / (m.depth * m.blocks)


def image_cost(c: ConfigDict, guide: ConfigDict | None = None, kept_count: int = 0) -> dict[str, float]:
    """Returns the cost of sampling an image, with the names of results.

    Args:
      guide: The config of the model of `sample.guide` (`stored_config.guide_config`). Its passes are added. A pass runs
        all layers of the guide.
      kept_count: Number of blocks of a picture that an edit keeps.
    """

    def counts(c: ConfigDict, flops: Cost) -> dict[str, float]:
        return {"nfe": nfe(c, kept_count), "passes": model_passes(c, kept_count), "flops": flops.total}

    cost = counts(c, sampling(c, kept_count=kept_count))
    if guide is not None and c.sample.guidance != 1.0:
        once = dataclasses.replace(sampling(guide, kept_count=kept_count), vae=0.0)  # images are decoded once
        cost = {name: cost[name] + x for name, x in counts(guide, once).items()}
    return {"solver_steps": c.sample.steps, **cost}


# ---- rates

# Dense FLOP/s of one JAX device from the vendors' data sheets: part of `device_kind`, bfloat16, and
# float32 as JAX computes it by default (TF32 on GPUs, bfloat16 products on TPUs). The first match
# counts.
_PEAK_RATES: tuple[tuple[str, float, float], ...] = (
    ("TPU v4", 275e12, 275e12),
    ("TPU v5 lite", 197e12, 197e12),
    ("TPU v5e", 197e12, 197e12),
    ("TPU v5", 459e12, 459e12),  # v5p
    ("TPU v6", 918e12, 918e12),
    ("TPU7x", 1153e12, 1153e12),  # a device is half a chip
    ("GB200", 2500e12, 1250e12),
    ("B200", 2250e12, 1125e12),
    ("H100 PCIe", 756e12, 378e12),
    ("H100", 989e12, 494e12),
    ("H200", 989e12, 494e12),
    ("GH200", 989e12, 494e12),
    ("A100", 312e12, 156e12),
    ("A10G", 70e12, 35e12),
    ("L40S", 362e12, 183e12),
    ("L4", 121e12, 60e12),
    ("RTX 5090", 209e12, 105e12),
    ("RTX 4090", 165e12, 83e12),
    ("RTX 3090", 71e12, 36e12),
)


def peak_rate(dtype: str = "float32", device: jax.Device | None = None) -> float:
    """Returns the peak FLOP/s of a device, by default the first local one.

    The rate is that of the data sheet. For other devices, such as CPUs, it is that of a measured
    matrix product.
    """
    device = device or jax.local_devices()[0]
    for kind, bfloat16, float32 in _PEAK_RATES:
        if re.search(rf"{kind}(?!\d)", device.device_kind):  # an L40 is not an L4
            return bfloat16 if dtype == "bfloat16" else float32
    return matmul_rate(dtype)


@functools.cache
def matmul_rate(dtype: str) -> float:
    """Measures the FLOP/s of a 2048 x 2048 matrix product on this machine, the best of 5.

    Takes half a second on a laptop.
    """
    x = jnp.ones((2048, 2048), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2.0 * 2048**3 / best


def mfu(cost: Cost, seconds: float, devices: int = 1, dtype: str = "float32") -> float:
    """Returns the model FLOPs utilization (MFU) of doing `cost` in `seconds`.

    It is the share of the peak rate of `devices` devices.
    """
    return cost.total / (seconds * devices * peak_rate(dtype))
