"""D in training and in sampling, if it varies (`train.elastic_depth`).

The training step draws D from `train.elastic_depths`. Sampling takes one D of this set
(`sample.diffusion_depth`). `validation` calls `check`; costs, training and sampling read the other
functions.
"""

from ml_collections import ConfigDict

from madformer_jax.errors import ConfigError


def trained_depths(c: ConfigDict) -> tuple[int, ...]:
    """Returns every D that a training step can have."""
    return tuple(c.train.elastic_depths) if c.train.elastic_depth else (c.model.diffusion_depth,)


def sampled_depth(c: ConfigDict) -> int:
    """Returns the D of sampling."""
    return int(c.sample.diffusion_depth or c.model.diffusion_depth)


def with_depth(c: ConfigDict, depth: int) -> ConfigDict:
    """Returns a copy of a config whose model has D = `depth` in training and in sampling."""
    c = c.copy_and_resolve_references()
    c.model.diffusion_depth, c.train.elastic_depth, c.sample.diffusion_depth = depth, False, 0
    return c


def check(c: ConfigDict) -> None:
    """Checks the set of depths and the D of sampling.

    Raises:
      ConfigError: A depth is not possible, several steps share a call, or sampling takes a D that training does not draw.
    """
    depths, default, n = tuple(c.train.elastic_depths), c.model.diffusion_depth, c.model.depth
    if c.train.elastic_depth:
        if not depths or len(set(depths)) < len(depths) or not all(1 <= depth <= n for depth in depths):
            raise ConfigError(
                f"config.train.elastic_depths={depths} must be different numbers of diffusion layers, each from 1 to "
                f"config.model.depth={n}."
            )
        if default not in depths:
            raise ConfigError(
                f"config.model.diffusion_depth={default} is not in config.train.elastic_depths={depths}: it is the D that "
                "sampling has by default, so it must be one of them."
            )
        if c.train.scan > 1:
            raise ConfigError(
                f"config.train.scan={c.train.scan} runs steps of one D in a call, and config.train.elastic_depth draws D for "
                "each step: set config.train.scan=1."
            )
    if c.sample.diffusion_depth and c.sample.diffusion_depth not in trained_depths(c):
        allowed = ", ".join(map(str, sorted(trained_depths(c))))
        advice = "" if c.train.elastic_depth else ", or train with config.train.elastic_depth=True"
        raise ConfigError(
            f"config.sample.diffusion_depth={c.sample.diffusion_depth}: the model is trained with D = {allowed} only. Use one "
            f"of them or 0{advice}."
        )
