"""Solvers for the reverse process (MADFormer, section 4).

| name | order | evaluations a step | method |
|---|---|---|---|
| `ddim` | 1 | 1 | DDIM without noise (Song et al., arXiv 2010.02502) |
| `dpmpp_2m` | 2 | 1 | DPM-Solver++ (2M), midpoint (Lu et al., arXiv 2211.01095) |
| `euler` | 1 | 1 | Euler steps along the velocity v |
| `heun` | 2 | 2 | Heun steps along the velocity v (Karras et al., arXiv 2206.00364, algorithm 1) |
| `ancestral` | 1 | 1 | samples of q(x_s | x_t, x0), the sampler of DDPM (Ho et al., arXiv 2006.11239) |

`Solver.coefficients` computes one row of weights for each evaluation of the network, in float64.
`sampler.BlockSteps.step` calls `Solver.step` for every row. The last step of any solver ends at the
clean latent and has one evaluation.

To add a solver, write a subclass of `Solver` with its `table` and add a line to `config.choices.SOLVERS`.
Override `step` if the update is not linear in what `SolverState` holds. Costs, budgets and interfaces
follow from `evaluations_per_step`. `step_levels`, `velocity_steps` and `make_rows` help to write a
table. `Heun` is an example of a step with two evaluations.
"""

import abc
import pkgutil
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Real

from madformer_jax.config import choices
from madformer_jax.diffusion.schedule import NoiseLevel, Schedule


class Coefficients(NamedTuple):
    """Coefficients of a solver, each (evaluations,), or scalars for one evaluation.

    Weights that a solver does not use are None.
    """

    level: NoiseLevel  # noise level of the evaluation
    index: Any  # number of the evaluation, from 0
    x_weight: Any
    x0_weight: Any
    previous_x0_weight: Any = None
    previous_x_weight: Any = None
    noise_weight: Any = None  # of stochastic solvers


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
    def table(self, schedule: Schedule, t: Real[np.ndarray, " ends"]) -> Coefficients:
        """Returns the coefficients of the evaluations in float64.

        Args:
          schedule: The noise path.
          t: Step k goes from t[k] to t[k + 1]. The last entry is `schedule.clean`. Timesteps of the
            DDPM path are integers, so a solver rounds a timestep between two of them and computes its
            weights from the noise level there (`schedule.level`).
        """

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


class DDIM(Solver):
    """DDIM: keeps the estimates of z and of the noise, and moves to the next noise level."""

    def table(self, schedule: Schedule, t: Real[np.ndarray, " ends"]) -> Coefficients:
        now, after = step_levels(schedule, t)
        x_weight = after.sigma / now.sigma
        return make_rows(schedule, t[:-1], x_weight, after.alpha - now.alpha * x_weight)


class DPMSolverPP2M(Solver):
    """DPM-Solver++ (2M): extrapolates the clean estimate, to first order at the first and last step."""

    skip_zero = True

    def table(self, schedule: Schedule, t: Real[np.ndarray, " ends"]) -> Coefficients:
        now, after = step_levels(schedule, t)
        x_weight = after.sigma / now.sigma
        x0_weight = after.alpha - now.alpha * x_weight
        previous_x0_weight = np.zeros(len(x0_weight))
        # Increase of half the log-SNR (lambda of DPM-Solver) in each step but the last, in which it
        # goes to infinity.
        lambda_increase = np.diff(np.log(now.alpha / now.sigma))
        for k in range(1, len(x0_weight) - 1):
            correction = x0_weight[k] * lambda_increase[k] / (2 * lambda_increase[k - 1])
            x0_weight[k] += correction
            previous_x0_weight[k] = -correction
        return make_rows(schedule, t[:-1], x_weight, x0_weight, previous_x0_weight=previous_x0_weight)


class Euler(Solver):
    """Euler steps along the velocity v; the last one goes to the clean estimate."""

    def table(self, schedule: Schedule, t: Real[np.ndarray, " ends"]) -> Coefficients:
        length, x_slope, x0_slope = velocity_steps(schedule, t)
        x_weight, x0_weight = 1 + length * x_slope[:-1], length * x0_slope[:-1]
        return make_rows(schedule, t[:-1], np.append(x_weight, 0), np.append(x0_weight, 1))


class Heun(Solver):
    """Heun steps along the velocity v: an Euler step, then one with the mean of the two velocities.

    The rows of a step are the Euler step, which starts at the sample x, and the correction, which is
    evaluated at the end of the Euler step and starts at x again (`previous_x`). The last step goes to
    the clean estimate.
    """

    evaluations_per_step = 2

    def table(self, schedule: Schedule, t: Real[np.ndarray, " ends"]) -> Coefficients:
        length, x_slope, x0_slope = velocity_steps(schedule, t)
        evaluations = self.evaluations(len(t) - 1)
        weights = np.zeros((4, evaluations))  # of x, x0, previous x0 and previous x
        weights[:2, :-1:2] = 1 + length * x_slope[:-1], length * x0_slope[:-1]
        half = length / 2
        weights[:, 1::2] = half * x_slope[1:], half * x0_slope[1:], half * x0_slope[:-1], 1 + half * x_slope[:-1]
        weights[1, -1] = 1
        x_weight, x0_weight, previous_x0_weight, previous_x_weight = weights
        return make_rows(
            schedule,
            t[(np.arange(evaluations) + 1) // 2],
            x_weight,
            x0_weight,
            previous_x0_weight=previous_x0_weight,
            previous_x_weight=previous_x_weight,
        )


class Ancestral(Solver):
    """Samples x_s from q(x_s | x_t, x0) with the clean estimate x0, for the next timestep s < t."""

    def table(self, schedule: Schedule, t: Real[np.ndarray, " ends"]) -> Coefficients:
        now, after = step_levels(schedule, t)
        alpha = now.alpha / after.alpha  # of q(x_t | x_s), whose variance is the next line
        variance = np.maximum(now.sigma**2 - (alpha * after.sigma) ** 2, 0)
        x_weight = alpha * (after.sigma / now.sigma) ** 2
        noise_weight = np.sqrt(variance) * after.sigma / now.sigma
        return make_rows(schedule, t[:-1], x_weight, after.alpha - now.alpha * x_weight, noise_weight=noise_weight)


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


def step_levels(schedule: Schedule, t: np.ndarray) -> tuple[NoiseLevel, NoiseLevel]:
    """Returns the noise levels at the start and at the end of each step."""
    return schedule.level(t[:-1]), schedule.level(t[1:])


def velocity_steps(schedule: Schedule, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the lengths of all steps but the last in the time of v, and weights of v = a x + b x0.

    Returns:
      The lengths (steps - 1,), and a and b at the start of every step, each (steps,).
    """
    level = schedule.level(t[:-1])
    lengths = np.diff(schedule.velocity_time(level.alpha, level.sigma))
    return lengths, level.v_noise / level.sigma, -1 / level.sigma


def make_rows(
    schedule: Schedule, t: np.ndarray, x_weight: np.ndarray, x0_weight: np.ndarray, **weights: Any
) -> Coefficients:
    """Makes the coefficients of evaluations at timesteps t."""
    return Coefficients(schedule.level(t), np.arange(len(t), dtype=np.int32), x_weight, x0_weight, **weights)
