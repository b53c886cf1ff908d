"""Training steps with a random number of diffusion layers D (`train.elastic_depth`).

`modes.train` calls `make_program`. Each D has a program of its own: a branch inside one program would
make the gradients of convolutions slow on CPUs (`train_step.make_step`).
"""

import itertools
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from madformer_jax.config import elastic_depth, seeds
from madformer_jax.models import layer_split
from madformer_jax.training import train_step

_STREAM = 0xD  # keeps the draws apart from others that start from the same seed


def draw_depth(depths: tuple[int, ...], seed: int, step: int) -> int:
    """Returns the D of a training step, a function of the seed and the step alone."""
    return depths[int(np.random.default_rng((_STREAM, seed, step)).integers(len(depths)))]


def make_program(
    s: train_step.Setup, c: ConfigDict, jit: Callable[[train_step.StepFn, str], train_step.StepFn], step: int
) -> train_step.StepFn:
    """Returns the compiled training step of a config, to be called for `step` and all later steps in order.

    Args:
      s: The setup of the config.
      c: The config.
      jit: Compiles a step. Its second argument describes the step, for the log.
      step: The first step.

    Returns:
      The step. With `train.elastic_depth`, each call runs the program of the D that its step draws.
    """
    depths = elastic_depth.trained_depths(c)
    if not c.train.elastic_depth:
        return jit(train_step.make_step(s, c), "the training step")
    programs = {
        depth: jit(
            train_step.make_step(s._replace(model=layer_split.with_depth(s.model, depth)), c),
            f"the training step of D = {depth}",
        )
        for depth in depths
    }
    depth_sequence = (draw_depth(depths, seeds.of(c, "data"), n) for n in itertools.count(step))
    return lambda *args: programs[next(depth_sequence)](*args)
