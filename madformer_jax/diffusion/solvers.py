"""Solvers for the reverse process (MADFormer, section 4).

| name | order | evaluations a step | method |
|---|---|---|---|
| `ddim` | 1 | 1 | DDIM without noise (Song et al., arXiv 2010.02502) |
| `dpmpp_2m` | 2 | 1 | DPM-Solver++ (2M), midpoint (Lu et al., arXiv 2211.01095) |
| `euler` | 1 | 1 | Euler steps along the velocity v |
| `heun` | 2 | 2 | Heun steps along the velocity v (Karras et al., arXiv 2206.00364, algorithm 1) |
| `ancestral` | 1 | 1 | samples of q(x_s | x_t, x0), the sampler of DDPM (Ho et al., arXiv 2006.11239) |

`Solver.stages` computes the weights of each evaluation of the network within a step, in float64, and
`Solver.coefficients` one row of weights for each evaluation of a run. `sampler.BlockSteps.step` calls
`Solver.step` for every row. The last step of any solver ends at the clean estimate and has one
evaluation.

To add a solver, write a subclass of `Solver` with its `stages` and add a line to `config.choices.SOLVERS`.
Override `step` if the update is not linear in what `SolverState` holds. Costs, budgets and interfaces
follow from `evaluations_per_step`. `Heun` is an example of a step with two evaluations.
"""

import abc
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Real

from madformer_jax.config import choices
from madformer_jax.diffusion.schedule import AnyArray, NoiseLevel, Schedule


class Coefficients(NamedTuple):
    """Coefficients of a solver, each (evaluations,), or scalars for one evaluation.

    Weights that a solver does not use are None.
    """

    level: NoiseLevel  # noise level of the evaluation
    x_weight: Any
    x0_weight: Any
    previous_x0_weight: Any = None
    previous_x_weight: Any = None
    noise_weight: Any = None  # of stochastic solvers
    index: Any = None  # number of the evaluation, from 0; None in `Solver.stages`


class PaddedCoefficients(NamedTuple):
    """Coefficients as arguments of a program, which serves every number of steps up to a size."""

    rows: Coefficients  # each (size,); the last evaluation is repeated up to the size
    evaluations: Any  # () int32, number of evaluations without repetitions


class SolverState(NamedTuple):
    """State of a solver. Arrays have the shape of x."""

    x: Array  # the sample
    x0: Array  # clean estimate of the latest evaluation
    previous_x: Array  # the sample before that evaluation


# (x, noise level) -> clean estimate, and keys and values of the evaluation for `Solver.step` to pass on
Denoise = Callable[[Array, NoiseLevel], tuple[Array, Any]]


class Solver(abc.ABC):
    """A solver. It has no fields; its state is a pytree and its coefficients are rows of a table."""

    evaluations_per_step: ClassVar[int] = 1  # rows of each step but the last, which has one
    skip_zero: ClassVar[bool] = False  # see `DDPM.solver_timesteps`

    @abc.abstractmethod
    def stages(self, schedule: Schedule, now: NoiseLevel, after: NoiseLevel) -> Sequence[Coefficients]:
        """Returns the coefficients of each evaluation within a step, in float64.

        Every array has the shape of `now.t`, (steps - 1,). The last step is not among them.

        Args:
          schedule: The noise path. `schedule.level(schedule.nearest(t))` is the noise level at a
            timestep t within a step.
          now: Noise levels at the start of each step.
          after: Noise levels at the end of each step. None of them is clean.
        """

    def table(self, schedule: Schedule, t: Real[np.ndarray, " ends"]) -> Coefficients:
        """Returns the coefficients of all evaluations in float64.

        Args:
          schedule: The noise path.
          t: Step k goes from t[k] to t[k + 1]. The last entry is `schedule.clean`.
        """
        stages = self.stages(schedule, schedule.level(t[:-2]), schedule.level(t[1:-1]))

        def interleave(values: Sequence[Any], last: float) -> np.ndarray:
            """Returns the values of all evaluations, from those of each stage and that of the last step."""
            return np.append(np.stack([np.broadcast_to(x, len(t) - 2) for x in values], axis=1), last)

        weights = {}
        for name in (name for name in Coefficients._fields if name.endswith("weight")):
            values = [getattr(stage, name) for stage in stages]
            if any(x is not None for x in values):
                weights[name] = interleave([0.0 if x is None else x for x in values], name == "x0_weight")
        times = interleave([stage.level.t for stage in stages], t[-2])
        return Coefficients(schedule.level(times), **weights, index=np.arange(len(times), dtype=np.int32))

    def coefficients(self, schedule: Schedule, spacing: str, steps: int) -> Coefficients:
        """Returns the coefficients of a number of steps in float32, see `Schedule.solver_timesteps`.

        Raises:
          ValueError: The path does not have the spacing.
        """
        rows = self.table(schedule, schedule.solver_timesteps(spacing, steps, self.skip_zero))
        t, index = rows.level.t.astype(schedule.dtype), rows.index
        rows = jax.tree.map(lambda x: np.asarray(x, np.float32), rows)
        return rows._replace(level=rows.level._replace(t=t), index=index)

    def evaluations(self, steps: int) -> int:
        """Returns the evaluations of the network in a number of steps."""
        return (steps - 1) * self.evaluations_per_step + 1

    def init(self, noise: Float[Array, " *shape"]) -> SolverState:
        """Returns the state before the first evaluation, which gives the past no weight."""
        return SolverState(noise, jnp.zeros_like(noise), jnp.zeros_like(noise))

    def step(
        self, denoise: Denoise, state: SolverState, row: Coefficients, normal: Callable[[], Array]
    ) -> tuple[SolverState, Any]:
        """Runs one evaluation and updates the sample.

        Args:
          denoise: Evaluates the network.
          state: The state.
          row: Coefficients of the evaluation.
          normal: Draws the standard normal noise of the evaluation, in the shape of x.

        Returns:
          The new state, and the keys and values that `denoise` returned.
        """
        x0, kv = denoise(state.x, row.level)
        x = row.x_weight * state.x + row.x0_weight * x0
        if row.previous_x0_weight is not None:
            x = x + row.previous_x0_weight * state.x0
        if row.previous_x_weight is not None:
            x = x + row.previous_x_weight * state.previous_x
        if row.noise_weight is not None:
            x = x + row.noise_weight * normal()
        return SolverState(x, x0, state.x), kv


def ddim_weights(now: NoiseLevel, after: NoiseLevel) -> tuple[AnyArray, AnyArray]:
    """Returns the weights of x and x0 in a DDIM step, which keeps x0 and eps = (x - alpha x0) / sigma."""
    x_weight = after.sigma / now.sigma
    return x_weight, after.alpha - now.alpha * x_weight


class DDIM(Solver):
    """DDIM: keeps the estimates of z and of the noise, and moves to the next noise level."""

    def stages(self, schedule: Schedule, now: NoiseLevel, after: NoiseLevel) -> Sequence[Coefficients]:
        return [Coefficients(now, *ddim_weights(now, after))]


class DPMSolverPP2M(Solver):
    """DPM-Solver++ (2M): extrapolates the clean estimate, to first order at the first and last step."""

    skip_zero = True

    def stages(self, schedule: Schedule, now: NoiseLevel, after: NoiseLevel) -> Sequence[Coefficients]:
        x_weight, x0_weight = ddim_weights(now, after)
        # Increase of half the log-SNR, lambda of DPM-Solver.
        increase = np.log(after.alpha / after.sigma) - np.log(now.alpha / now.sigma)
        correction = np.zeros_like(x0_weight)
        correction[1:] = x0_weight[1:] * increase[1:] / (2 * increase[:-1])
        return [Coefficients(now, x_weight, x0_weight + correction, previous_x0_weight=-correction)]


class Euler(Solver):
    """Euler steps along the velocity v; the last one goes to the clean estimate."""

    def stages(self, schedule: Schedule, now: NoiseLevel, after: NoiseLevel) -> Sequence[Coefficients]:
        x, x0 = velocity_weights(now, step_length(schedule, now, after))
        return [Coefficients(now, 1 + x, x0)]


class Heun(Solver):
    """Heun steps along the velocity v: an Euler step, then one with the mean of the two velocities.

    The correction is evaluated at the end of the Euler step and starts at the sample x of the Euler step
    again (`previous_x`).
    """

    evaluations_per_step = 2

    def stages(self, schedule: Schedule, now: NoiseLevel, after: NoiseLevel) -> Sequence[Coefficients]:
        length = step_length(schedule, now, after)
        x, x0 = velocity_weights(now, length)
        half_x, half_x0 = velocity_weights(now, length / 2)
        end_x, end_x0 = velocity_weights(after, length / 2)
        return [
            Coefficients(now, 1 + x, x0),
            Coefficients(after, end_x, end_x0, previous_x0_weight=half_x0, previous_x_weight=1 + half_x),
        ]


class Ancestral(Solver):
    """Samples x_s from q(x_s | x_t, x0) with the clean estimate x0, for the next timestep s < t."""

    def stages(self, schedule: Schedule, now: NoiseLevel, after: NoiseLevel) -> Sequence[Coefficients]:
        alpha = now.alpha / after.alpha  # of q(x_t | x_s), whose variance is the next line
        variance = np.maximum(now.sigma**2 - (alpha * after.sigma) ** 2, 0)
        x_weight = alpha * (after.sigma / now.sigma) ** 2
        noise_weight = np.sqrt(variance) * after.sigma / now.sigma
        return [Coefficients(now, x_weight, after.alpha - now.alpha * x_weight, noise_weight=noise_weight)]


def make(name: str) -> Solver:
    """Returns the solver with a name of `choices.SOLVERS`."""
    solver: type[Solver] = pkgutil.resolve_name(f"madformer_jax.diffusion.{choices.SOLVERS[name]}")
    return solver()


def evaluation_rows(coefficients: Coefficients) -> list[Coefficients]:
    """Splits coefficients into one row of scalars for each evaluation."""
    return [jax.tree.map(lambda x, k=k: x[k], coefficients) for k in range(len(coefficients.index))]


def pad(coefficients: Coefficients, size: int) -> PaddedCoefficients:
    """Pads coefficients to a number of evaluations.

    Args:
      coefficients: Coefficients of all evaluations, of which there are at most `size`.
      size: Length of the padded arrays.
    """
    count = len(coefficients.index)
    rows = jax.tree.map(lambda x: np.pad(x, (0, size - count), mode="edge"), coefficients)
    return PaddedCoefficients(rows, np.int32(count))


def step_length(schedule: Schedule, start: NoiseLevel, end: NoiseLevel) -> np.ndarray:
    """Returns the lengths of steps in the time of the velocity v."""
    return schedule.velocity_time(end.alpha, end.sigma) - schedule.velocity_time(start.alpha, start.sigma)


def velocity_weights(level: NoiseLevel, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weights of x and of the clean estimate in a step of v, length * v."""
    return length * (level.v_noise / level.sigma), length * (-1 / level.sigma)
