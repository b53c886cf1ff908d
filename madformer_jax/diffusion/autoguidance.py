"""Autoguidance: a smaller or earlier model guides in place of the null label.

Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself" (arXiv 2406.02507).
The guided prediction is guide + w (model - guide). `sampling.opening.TrainedModel.sampled` pairs a
model with its guide. `sampler.BlockSteps` then runs the pair as if it were one model whose
predictions have the rows of the guide behind those of the model.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from madformer_jax.models.cache import ModelCache
from madformer_jax.models.madformer import MADFormer, ModelConfig


class PairCache(NamedTuple):
    """The caches of both models, and the finished blocks, which are the same for both."""

    model: ModelCache
    guide: ModelCache
    finished_blocks: Array | None = None  # (B, L, positions, C), if the U-Net of one of them reads neighbors


class GuidedPair(NamedTuple):
    """A model and its guide, with the decoding methods of `MADFormer` on pairs of arrays.

    Its parameters are the pair of both parameters. Blocks, latents and conditions of both must agree.
    """

    model: MADFormer
    guide: MADFormer

    @property
    def config(self) -> ModelConfig:
        """Values of the model, with `unet_context` if one of both has it, and `unrolls_layers` if both have it."""
        configs = self.model.config, self.guide.config
        attention = next((c.attention for c in configs if not c.attention.unrolls_layers), configs[0].attention)
        return dataclasses.replace(configs[0], unet_context=any(c.unet_context for c in configs), attention=attention)

    def apply(self, variables: Any, *args: Any, method: str) -> Any:
        """Calls a decoding method of both models, as `flax.linen.Module.apply` does for one."""
        params, guide_params = variables["params"]

        def model(*args: Any) -> Any:
            return self.model.apply({"params": params}, *args, method=method)

        def guide(*args: Any) -> Any:
            return self.guide.apply({"params": guide_params}, *args, method=method)

        if method == "empty_cache":
            return PairCache(model(*args), guide(*args))
        if method == "begin":
            return model(*args), guide(*args)
        pair, *rest = args  # The caches of both have no finished blocks between two calls.
        caches = [
            cache._replace(finished_blocks=pair.finished_blocks if network.config.unet_context else None)
            for cache, network in ((pair.model, self.model), (pair.guide, self.guide))
        ]
        if method == "cache_text":
            return _replace(pair, model(caches[0], *rest), guide(caches[1], *rest))
        if method == "embed_clean":
            return model(caches[0], *rest), guide(caches[1], *rest)
        (model_input, guide_input), *rest = rest  # a pair of arrays, and arguments that both share
        outputs = model(caches[0], model_input, *rest), guide(caches[1], guide_input, *rest)
        if method in ("cache_clean", "cache_noisy"):
            return _replace(pair, *outputs)
        arrays, others = zip(*outputs, strict=True)
        return (arrays, _replace(pair, *others)) if method == "condition" else (jnp.concatenate(arrays), others)


def _replace(pair: PairCache, model: ModelCache, guide: ModelCache) -> PairCache:
    """Returns the caches with new caches of both models, without their copies of the finished blocks."""
    return pair._replace(model=model._replace(finished_blocks=None), guide=guide._replace(finished_blocks=None))
