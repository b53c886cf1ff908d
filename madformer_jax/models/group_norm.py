"""GroupNorm and SiLU with little memory traffic in a GPU's training.

XLA passes over the input of a GroupNorm once for the mean, once for the variance and once to
normalize. It also stores the result before SiLU for the gradient. `group_norm_silu` reads the input
twice and stores nothing more. Its gradient reads the input and the gradient twice.
`layers.ResNetBlock` uses it in the block U-Net on a GPU.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

_Residuals = tuple[Array, Array, Array, Array, Array]


class GroupNormSilu(nn.Module):
    """GroupNorm and SiLU, with the parameters of `layers.group_norm`."""

    groups: int
    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "n height width c"]) -> Float[Array, "n height width c"]:
        def param(name: str, init: nn.initializers.Initializer) -> Array:
            return jnp.asarray(
                self.param(name, nn.with_logical_partitioning(init, ("norm",)), x.shape[-1:], jnp.float32)
            )

        scale, bias = param("scale", nn.initializers.ones), param("bias", nn.initializers.zeros)
        return group_norm_silu(x.astype(self.dtype), scale, bias, self.groups, self.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_norm_silu(
    x: Float[Array, "n height width c"], scale: Float[Array, " c"], bias: Float[Array, " c"], groups: int, eps: float
) -> Float[Array, "n height width c"]:
    """Computes SiLU(GroupNorm(x)).

    Without a gradient it calls Flax' GroupNorm, for which XLA has better kernels with the few blocks of
    sampling. With a gradient it computes everything in float32 and rounds once.

    Args:
      x: Input.
      scale: Scale of each channel.
      bias: Bias of each channel.
      groups: Number of groups of adjacent channels.
      eps: Constant that is added to the variance.
    """
    norm = nn.GroupNorm(groups, epsilon=eps, dtype=x.dtype, use_fast_variance=False)
    return nn.silu(norm.apply({"params": {"scale": scale, "bias": bias}}, x))


def _forward(x: Array, scale: Array, bias: Array, groups: int, eps: float) -> tuple[Array, _Residuals]:
    count = x[0].size // groups
    # The sums are those of differences to a value of the group, so that a large mean cancels no digits.
    origin = _group_sums(x[:, 0, 0].astype(jnp.float32), groups) * (groups / x.shape[-1])
    shifted = x.astype(jnp.float32) - origin[:, None, None]
    sums, squares = (_group_sums(y, groups) / count for y in _position_sums(shifted, jnp.square(shifted)))
    mean = origin + sums
    inverse = jax.lax.rsqrt(jnp.maximum(squares - jnp.square(sums), 0.0) + eps)
    mean, inverse = (y[:, None, None] for y in (mean, inverse))
    y = nn.silu((x.astype(jnp.float32) - mean) * (inverse * scale) + bias)
    return y.astype(x.dtype), (x, scale, bias, mean, inverse)


def _position_sums(
    x: Float[Array, "n height width c"], y: Float[Array, "n height width c"]
) -> tuple[Float[Array, "n c"], Float[Array, "n c"]]:
    """Returns the sums over positions of two arrays, as one reduction. XLA would otherwise store what they share."""
    zero = jnp.zeros((), x.dtype)
    sums = jax.lax.reduce((x, y), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), (1, 2))
    return sums[0], sums[1]


def _group_sums(x: Float[Array, "n c"], groups: int) -> Float[Array, "n c"]:
    """Replaces each channel by the sum over its group."""
    sums = x.reshape(len(x), groups, -1).sum(axis=-1)
    return jnp.repeat(sums, x.shape[-1] // groups, axis=-1)


def _backward(groups: int, eps: float, residuals: _Residuals, dy: Array) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, inverse = residuals

    def differences(x: Array, dy: Array) -> tuple[Array, Array]:
        """Returns the normalized input, and the gradient of the result of GroupNorm."""
        normalized = (x.astype(jnp.float32) - mean) * inverse
        z = normalized * scale + bias
        sigmoid = jax.nn.sigmoid(z)
        return normalized, dy.astype(jnp.float32) * sigmoid * (1 + z * (1 - sigmoid))

    normalized, dz = differences(x, dy)
    d_bias, d_scale = _position_sums(dz, dz * normalized)
    means = (_group_sums(d * scale, groups)[:, None, None] / (x[0].size // groups) for d in (d_bias, d_scale))
    # The barrier separates both passes. XLA would otherwise store what they share, in float32.
    x, dy, mean_d, mean_product = jax.lax.optimization_barrier((x, dy, *means))
    normalized, dz = differences(x, dy)
    dx = inverse * (dz * scale - mean_d - normalized * mean_product)
    return dx.astype(x.dtype), d_scale.sum(axis=0), d_bias.sum(axis=0)


group_norm_silu.defvjp(_forward, _backward)
