"""Noise paths: x_t = alpha(t) z + sigma(t) noise, timesteps of training and timesteps of a solver.

On every path a timestep t goes from 0 (little noise) to 999 (almost only noise). The network reads t,
and guidance intervals and `train.context_noise` are given in t. `losses` draws timesteps and noise
from a schedule (MADFormer, section 3.4), and `solvers` computes its coefficients from it (section 4).

To add a path, write a subclass of `ContinuousSchedule` and add a line to `config.choices.NOISE_PATHS`.
It needs `alpha_sigma`, and `velocity` with `velocity_time` unless alpha^2 + sigma^2 = 1.
"""

import abc
import dataclasses
import math
import pkgutil
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Real

from madformer_jax.config import choices

NUM_TIMESTEPS = 1000
MAX_TIMESTEP = NUM_TIMESTEPS - 1

AnyArray = Array | np.ndarray
Levels = tuple[Float[AnyArray, " *shape"], Float[AnyArray, " *shape"]]  # alpha and sigma


class NoiseLevel(NamedTuple):
    """Noise at timesteps: x = alpha z + sigma noise, v = v_noise noise - v_clean z.

    The fields have one shape, or shapes that broadcast.
    """

    t: Any
    alpha: Any
    sigma: Any
    v_noise: Any
    v_clean: Any


@dataclasses.dataclass(frozen=True)
class Schedule(abc.ABC):
    """A noise path; hashable, so that it can be static under jit.

    Methods on timesteps take JAX arrays (float32 results) or NumPy arrays (float64 results).
    """

    time_sampling: str = "uniform"  # distribution of the training timesteps, `choices.TIME_SAMPLINGS`
    shift: float = 1.0  # moves timesteps of training and solver to more noise if above 1

    clean: ClassVar[float]  # the timestep of the clean latent, alpha = 1 and sigma = 0
    dtype: ClassVar[Any] = jnp.float32  # of timesteps

    @abc.abstractmethod
    def alpha_sigma(self, t: Real[AnyArray, " *shape"]) -> Levels:
        """Returns alpha and sigma at timesteps from 0 to 999, and exactly (1, 0) at `clean`."""

    @abc.abstractmethod
    def training_timesteps(self, key: Array, shape: tuple[int, ...]) -> Real[Array, "..."]:
        """Draws the timesteps of noisy blocks in training."""

    @abc.abstractmethod
    def training_quantiles(self, u: Float[np.ndarray, " *shape"]) -> Float[np.ndarray, " *shape"]:
        """Returns the timesteps below which shares u of the training timesteps lie, 0 <= u < 1."""

    @abc.abstractmethod
    def uniform_timesteps(self, key: Array, shape: tuple[int, ...], max_timestep: int) -> Real[Array, "..."]:
        """Draws timesteps uniformly from 0 to a largest one, for noise on the context."""

    @abc.abstractmethod
    def solver_timesteps(self, spacing: str, steps: int, skip_zero: bool = False) -> Real[np.ndarray, " {steps}+1"]:
        """Returns the timesteps of a solver, whose step k goes from entry k to entry k + 1.

        The last entry is `clean`.

        Args:
          spacing: `trailing`, `leading` or `linspace`.
          steps: Number of solver steps.
          skip_zero: See `DDPM.solver_timesteps`.

        Raises:
          ValueError: The path does not have the spacing.
        """

    def nearest(self, t: Real[np.ndarray, " *shape"]) -> Real[np.ndarray, " *shape"]:
        """Returns the timesteps of the path that are nearest to t, which a solver may evaluate."""
        return t

    @abc.abstractmethod
    def timesteps_to_clean(self, start: Real[Array, " *shape"], steps: int) -> Real[Array, " ends *shape"]:
        """Returns the timesteps of solver steps that begin at any timestep.

        From timestep 999 they are those of `solver_timesteps("trailing", steps)`, up to the rounding of halves.

        Args:
          start: The first timestep of each block, from 0 to 999.
          steps: Number of solver steps.

        Returns:
          Timesteps of which step k goes from entry k to entry k + 1, `(steps + 1, *shape)`. The last entry
          is `clean`.
        """

    def velocity(self, alpha: AnyArray, sigma: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Returns the weights a and b of v = a noise - b z, with a alpha + b sigma = 1.

        v is the velocity dx / dtau of the path in the time tau of `velocity_time`. If
        alpha^2 + sigma^2 = 1, as by default, tau is the angle atan(sigma / alpha) (Salimans & Ho,
        arXiv 2202.00512). Any other path has a time with a alpha + b sigma = 1 too.
        """
        return alpha, sigma

    def velocity_time(self, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        """Returns the time tau of `velocity`; it is 0 at the clean latent."""
        return np.arctan2(sigma, alpha)

    def level(self, t: Real[AnyArray, "..."]) -> NoiseLevel:
        """Returns the noise level at timesteps."""
        alpha, sigma = self.alpha_sigma(t)
        return NoiseLevel(t, alpha, sigma, *self.velocity(alpha, sigma))

    def add_noise(
        self, z: Float[Array, "B L positions C"], noise: Float[Array, "B L positions C"], t: Real[Array, "B L"]
    ) -> Float[Array, "B L positions C"]:
        """Returns alpha z + sigma noise, a sample of q(z_t | z), with a timestep for each block."""
        level = self.level(t[..., None, None])
        return level.alpha * z + level.sigma * noise


def _countdown(steps: int, ndim: int) -> Int[Array, "ends ..."]:
    """Returns steps, ..., 1, 0 along the first of 1 + ndim axes."""
    return jnp.arange(steps, -1, -1).reshape(-1, *(1,) * ndim)


def array_namespace(x: Any) -> ModuleType:
    """Returns NumPy for a NumPy array, and otherwise jax.numpy."""
    return np if isinstance(x, np.ndarray) else jnp


def alphas_cumprod() -> Float[np.ndarray, "1000"]:
    """Returns alpha_bar_t for t = 0..999, float64, from betas rounded to float32 as in PyTorch."""
    betas = np.linspace(1e-4, 2e-2, NUM_TIMESTEPS, dtype=np.float32)
    return np.cumprod(1.0 - betas.astype(np.float64))


@dataclasses.dataclass(frozen=True)  # so that __post_init__ is called
class DDPM(Schedule):
    """The path of the release: integers 0..999 with linear betas from 1e-4 to 2e-2 (section 3.4)."""

    clean = -1
    dtype = jnp.int32

    def __post_init__(self) -> None:
        if (self.time_sampling, self.shift) != ("uniform", 1.0):
            raise ValueError("the DDPM path has uniform timesteps without a shift")

    def alpha_sigma(self, t: Int[AnyArray, " *shape"]) -> Levels:
        xp = array_namespace(t)
        table = xp.asarray(np.append(alphas_cumprod(), 1.0), float if xp is np else jnp.float32)
        alpha_bar = table[t]  # index -1 is the clean latent
        return xp.sqrt(alpha_bar), xp.sqrt(1 - alpha_bar)

    def training_timesteps(self, key: Array, shape: tuple[int, ...]) -> Int[Array, "..."]:
        return self.uniform_timesteps(key, shape, MAX_TIMESTEP)

    def training_quantiles(self, u: Float[np.ndarray, " *shape"]) -> Float[np.ndarray, " *shape"]:
        return np.floor(NUM_TIMESTEPS * u)

    def uniform_timesteps(self, key: Array, shape: tuple[int, ...], max_timestep: int) -> Int[Array, "..."]:
        return jax.random.randint(key, shape, 0, max_timestep + 1, self.dtype)

    def solver_timesteps(self, spacing: str, steps: int, skip_zero: bool = False) -> Int[np.ndarray, " {steps}+1"]:
        """Returns the timesteps of a solver, see `Schedule.solver_timesteps`.

        `leading` and `linspace` follow diffusers. `trailing` starts at t = 999. With `skip_zero`, as
        diffusers has it for DPM-Solver++, `leading` and `linspace` compute one more timestep and drop
        t = 0.
        """
        count = steps + skip_zero
        if spacing == "trailing":
            t = np.round(np.arange(NUM_TIMESTEPS, 0, -NUM_TIMESTEPS / steps)) - 1
        elif spacing == "leading":
            t = (np.arange(count) * (NUM_TIMESTEPS // count))[::-1]
        elif spacing == "linspace":
            t = np.linspace(0, MAX_TIMESTEP, count)[::-1]
        else:
            raise ValueError(f"spacing {spacing!r} is unknown: trailing, leading or linspace")
        return self.nearest(np.append(t[:steps], self.clean))

    def nearest(self, t: Real[np.ndarray, " *shape"]) -> Int[np.ndarray, " *shape"]:
        return np.rint(t).astype(np.int32)

    def timesteps_to_clean(self, start: Int[Array, " *shape"], steps: int) -> Int[Array, " ends *shape"]:
        """Returns rounded timesteps. Only the last one is `clean`, so a timestep repeats if there are too few."""
        remaining = _countdown(steps, start.ndim)
        distance = jnp.round((start - self.clean) * remaining / steps).astype(self.dtype)
        return self.clean + jnp.maximum(distance, jnp.minimum(remaining, 1))


class ContinuousSchedule(Schedule):
    """A path in continuous time u = (t + 0.5) / 1000, from 0 (the clean latent) to 1 (noise).

    Timesteps are floats from 0 to 999. So u keeps a distance of 0.0005 from its ends, at which eps or
    x0 cannot be computed from x. The resolution shift s maps u to s u / (1 + (s - 1) u) (Esser et
    al., arXiv 2403.03206, equation 23). The solver shifts u. Training shifts t / 999.
    """

    clean = -0.5

    def training_timesteps(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Draws t = 999 s(u): u is uniform, or the sigmoid of a standard normal, and s is the shift."""
        logit_normal = self.time_sampling == "logit_normal"
        u = jax.nn.sigmoid(jax.random.normal(key, shape)) if logit_normal else jax.random.uniform(key, shape)
        return MAX_TIMESTEP * self._shifted(u)

    def training_quantiles(self, u: Float[np.ndarray, " *shape"]) -> Float[np.ndarray, " *shape"]:
        if self.time_sampling == "logit_normal":
            from scipy import special  # the import takes a second

            u = special.expit(special.ndtri(u))
        return MAX_TIMESTEP * self._shifted(u)

    def uniform_timesteps(self, key: Array, shape: tuple[int, ...], max_timestep: int) -> Float[Array, "..."]:
        return jax.random.uniform(key, shape, maxval=max_timestep)

    def solver_timesteps(self, spacing: str, steps: int, skip_zero: bool = False) -> Float[np.ndarray, " {steps}+1"]:
        """Returns evenly spaced timesteps from 999 to the clean end, shifted."""
        if spacing != "trailing":
            raise ValueError(f"a continuous path has no spacing {spacing!r}: use trailing")
        u = self._shifted(np.arange(steps, -1, -1) / steps)
        return self.clean + (MAX_TIMESTEP - self.clean) * u

    def timesteps_to_clean(self, start: Float[Array, " *shape"], steps: int) -> Float[Array, " ends *shape"]:
        length = MAX_TIMESTEP - self.clean
        u = (start - self.clean) / length
        u = u / (self.shift - (self.shift - 1) * u)  # inverts the shift
        return self.clean + length * self._shifted(u * _countdown(steps, start.ndim) / steps)

    def _shifted(self, u: Any) -> Any:
        return self.shift * u / (1 + (self.shift - 1) * u)


class Flow(ContinuousSchedule):
    """Rectified flow: x = (1 - u) z + u noise, v = dx / du = noise - z (Liu et al., arXiv 2209.03003)."""

    def alpha_sigma(self, t: Real[AnyArray, " *shape"]) -> Levels:
        return (NUM_TIMESTEPS - 0.5 - t) / NUM_TIMESTEPS, (t + 0.5) / NUM_TIMESTEPS

    def velocity(self, alpha: AnyArray, sigma: AnyArray) -> tuple[AnyArray, AnyArray]:
        ones = array_namespace(alpha).ones_like(alpha)
        return ones, ones

    def velocity_time(self, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        return sigma


class Cosine(ContinuousSchedule):
    """Nichol & Dhariwal's path: alpha_bar = f(u) / f(0), f(u) = cos^2(pi / 2 (u + s) / (1 + s)), s = 0.008.

    Source: arXiv 2102.09672, equation 17, in continuous time. Differences of squared cosines are
    products of sines, so that alpha and sigma are exact in float32 near both ends.
    """

    def alpha_sigma(self, t: Real[AnyArray, " *shape"]) -> Levels:
        xp, s = array_namespace(t), 0.008
        rate = math.pi / 2 / (1 + s)
        u, rest = (t + 0.5) / NUM_TIMESTEPS, (NUM_TIMESTEPS - 0.5 - t) / NUM_TIMESTEPS
        scale = math.cos(rate * s)
        return xp.sin(rate * rest) / scale, xp.sqrt(xp.sin(rate * u) * xp.sin(rate * (u + 2 * s))) / scale


def make(path: str = "ddpm", time_sampling: str = "uniform", shift: float = 1.0) -> Schedule:
    """Returns the schedule of the fields of `config.diffusion`."""
    schedule: type[Schedule] = pkgutil.resolve_name(f"madformer_jax.diffusion.{choices.NOISE_PATHS[path]}")
    return schedule(time_sampling, shift)


DEFAULT = DDPM()  # path of the release
