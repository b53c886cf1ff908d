"""Building blocks of the networks: linear layers, convolutions, norms, SiLU and the ResNet block.

`transformer`, `unet` and `vae` are made of them. Every parameter has logical axes, which
`runtime.partitioning.RULES` maps to the axes of the mesh. A new kind of parameter needs logical axes
from those rules.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float

from madformer_jax.models.group_norm import GroupNormSilu

Params = Mapping[str, Any]  # arrays by the names of modules and parameters, nested
GROUP_NORM_EPS = 1e-6  # in the block U-Net (MADFormer, section 3.1) and in the VAE


def _uniform_init(scale: float, mode: Literal["fan_in", "fan_avg"]) -> nn.initializers.Initializer:
    """Returns an initializer of uniform weights with variance scale / fan.

    It is jitted because Flax traces the initializer whenever it reads a parameter.
    """
    return jax.jit(nn.initializers.variance_scaling(scale, mode, "uniform"), static_argnums=(1, 2))


XAVIER_INIT = _uniform_init(1, "fan_avg")
XAVIER_QKV_INIT = _uniform_init(1 / 2, "fan_in")  # for each d x d third of a d x 3 d matrix
_CONV_INIT = _uniform_init(1 / 3, "fan_in")  # the default of PyTorch
NORM_SCALE_INIT = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))


def all_gather_kernel(
    kernel: Float[Array, "*shape"], axes: Sequence[str | None] | PartitionSpec
) -> Float[Array, "*shape"]:
    """Gathers a kernel before its product; only the split over the mesh axis "tensor" remains.

    Without it, XLA's partitioner for TPUs turns a product with a kernel that is split along the
    contracted axis into a loop of thin products, which takes four times as long
    (docs/engineering_log.md). The gradient is summed and split again.

    Args:
      kernel: The kernel, already in the type of the product.
      axes: Its logical axes.
    """
    gathered_axes = {"embed": None, "conv_out": "conv_used"}
    return nn.with_logical_constraint(kernel, tuple(gathered_axes.get(axis or "", axis) for axis in axes))


def flattened_dot_general(
    x: Float[Array, "*rows d"],
    kernel: Float[Array, "d f"],
    dimension_numbers: Any,
    *,
    axes: tuple[str, str],
    **settings: Any,
) -> Float[Array, "*rows f"]:
    """Multiplies x by a matrix as one product of two matrices.

    With more axes to contract, XLA on CPU first transposes the operands of the kernel's gradient.

    Args:
      x: Input.
      kernel: Matrix.
      dimension_numbers: Ignored. Flax passes them.
      axes: Logical axes of the kernel.
      **settings: Further arguments of `jax.lax.dot_general`.
    """
    kernel = all_gather_kernel(kernel, axes)
    rows = x.reshape(-1, x.shape[-1])
    return jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **settings).reshape(*x.shape[:-1], -1)


@jax.checkpoint
def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes SiLU, x sigmoid(x).

    The gradient recomputes the sigmoid, which costs less than to store it.
    """
    return nn.silu(x)


@jax.custom_vjp
def swiglu(gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes SwiGLU's silu(gate) up.

    The backward pass materializes both gradients. The compiler for TPUs would otherwise recompute
    them in each of the four products that read them.
    """
    with jax.named_scope("swiglu"):
        return nn.silu(gate) * up


def _swiglu_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    with jax.named_scope("swiglu"):
        _, vjp = jax.vjp(lambda gate, up: nn.silu(gate) * up, *residuals)
        return jax.lax.optimization_barrier(vjp(gradient))


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


@jax.custom_vjp
def swiglu_product(
    gate: Float[Array, "rows f"], up: Float[Array, "rows f"], kernel: Float[Array, "f d"]
) -> Float[Array, "rows d"]:
    """Computes (silu(gate) up) kernel.

    The backward pass reads gate, up and their gradient once and writes all three arrays that the
    products read. On a GPU, where XLA would otherwise pass over them three times, that is 40 % less
    memory traffic.
    """
    return swiglu(gate, up) @ kernel


def _swiglu_product_backward(residuals: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    gate, up, kernel = residuals
    # The barrier lets the compiler see three element-wise functions of the same three arrays.
    gate, up, d_hidden = jax.lax.optimization_barrier((gate, up, gradient @ kernel.T))
    with jax.named_scope("swiglu"):
        hidden, vjp = jax.vjp(lambda gate, up: nn.silu(gate) * up, gate, up)
        d_gate, d_up = vjp(d_hidden)
    return d_gate, d_up, hidden.T @ gradient


swiglu_product.defvjp(lambda *x: (swiglu_product(*x), x), _swiglu_product_backward)


class SwigluProduct(nn.Module):
    """SwiGLU and the linear layer behind it, without a bias.

    Attributes:
      features: Size of the output.
      dtype: Type of the computation.
      one_pass: Whether the gradient has the form of `swiglu_product`, for GPUs.
    """

    features: int
    dtype: DTypeLike
    one_pass: bool

    @nn.compact
    def __call__(self, gate: Float[Array, "*rows f"], up: Float[Array, "*rows f"]) -> Float[Array, "*rows d"]:
        axes = "mlp", "embed"
        init = nn.with_logical_partitioning(XAVIER_INIT, axes)
        kernel = self.param("kernel", init, (gate.shape[-1], self.features), jnp.float32)
        if not self.one_pass:
            hidden = swiglu(gate, up)
            return flattened_dot_general(hidden, jnp.asarray(kernel, self.dtype), None, axes=axes)
        rows = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
        kernel = all_gather_kernel(jnp.asarray(kernel, self.dtype), axes)
        return swiglu_product(*rows, kernel).reshape(*gate.shape[:-1], -1)


class ProductAndBias(nn.Module):
    """The linear layer of `dense`, which returns its product and its bias for a caller that adds them."""

    features: int
    axes: tuple[str, str]
    dtype: DTypeLike
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> tuple[Float[Array, "*rows f"], Float[Array, " f"]]:
        init = nn.with_logical_partitioning(self.init, self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
        bias = self.param("bias", init, (self.features,), jnp.float32)
        x, kernel, bias = (jnp.asarray(y, self.dtype) for y in (x, kernel, bias))
        return flattened_dot_general(x, kernel, None, axes=self.axes), bias


class NormScale(nn.Module):
    """Learned scale of a norm that `ops.attention.qk_norm_rope` computes."""

    size: int

    @nn.compact
    def __call__(self) -> Float[Array, " {self.size}"]:
        return jnp.asarray(self.param("scale", NORM_SCALE_INIT, (self.size,), jnp.float32))


def dense(
    features: int,
    axes: tuple[str, str],
    dtype: DTypeLike,
    *,
    bias: bool = True,
    init: nn.initializers.Initializer = XAVIER_INIT,
    precision: str | None = None,
    name: str | None = None,
) -> nn.Dense:
    """Returns a linear layer.

    Args:
      features: Size of the output.
      axes: Logical axes of the kernel.
      dtype: Type of the computation.
      bias: Whether the layer has a bias, which is initialized to 0.
      init: Initializer of the kernel, by default Xavier uniform.
      precision: Precision of the product, see `jax.lax.dot_general`.
      name: Name of the layer.
    """
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=dtype,
        precision=precision,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
        dot_general=functools.partial(flattened_dot_general, axes=axes),
        name=name,
    )


def conv(
    features: int,
    size: int,
    dtype: DTypeLike,
    *,
    stride: int = 1,
    padding: int | Sequence[tuple[int, int]] | None = None,
    precision: str | None = None,
    name: str | None = None,
) -> nn.Conv:
    """Returns a size x size convolution.

    By default it pads (size - 1) / 2 positions on both sides, also when strided, as in PyTorch.
    """
    axes = (None, None, "conv_in", "conv_out")

    def convolve(
        x: Float[Array, "n height width c"], kernel: Float[Array, "size size c f"], *args: Any, **settings: Any
    ) -> Float[Array, "n height_out width_out f"]:
        kernel = all_gather_kernel(kernel, axes)
        if x.shape[1:3] == (2, 2) and (size, stride, padding) == (3, 1, None):
            return _convolve_2x2(x, kernel, settings["precision"])
        return jax.lax.conv_general_dilated(x, kernel, *args, **settings)

    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=(size - 1) // 2 if padding is None else padding,
        dtype=dtype,
        precision=precision,
        kernel_init=nn.with_logical_partitioning(_CONV_INIT, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",)),
        conv_general_dilated=convolve,
        name=name,
    )


def _convolve_2x2(
    x: Float[Array, "n 2 2 c"], kernel: Float[Array, "3 3 c f"], precision: jax.lax.PrecisionLike
) -> Float[Array, "n 2 2 f"]:
    """Computes a padded 3 x 3 convolution of 2 x 2 positions as one product of matrices.

    Every output position depends on all four inputs. XLA on CPU takes ten times as long for the
    convolution.
    """
    n, _, _, channels = x.shape
    tap = np.array([[1, 0], [2, 1]])  # tap[input, output]: index in the kernel along one axis
    matrix = kernel[tap[:, None, :, None], tap[None, :, None, :]]  # (input y, input x, output y, output x, c, f)
    matrix = matrix.transpose(0, 1, 4, 2, 3, 5).reshape(4 * channels, -1)
    return jax.lax.dot(x.reshape(n, 4 * channels), matrix, precision=precision).reshape(n, 2, 2, -1)


def rms_norm(eps: float, dtype: DTypeLike) -> nn.RMSNorm:
    """Returns an RMSNorm with learned scale."""
    return nn.RMSNorm(epsilon=eps, dtype=dtype, scale_init=NORM_SCALE_INIT)


def group_norm(groups: int, dtype: DTypeLike, name: str) -> nn.GroupNorm:
    """Returns a GroupNorm that computes the variance in two passes, exact also for large means."""
    return nn.GroupNorm(
        groups,
        epsilon=GROUP_NORM_EPS,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=NORM_SCALE_INIT,
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )


def unstack_layers(params: Params, unroll: int) -> Params:
    """Splits parameters of a `LayerStack` into one tree per layer, if the scan is unrolled.

    Sampling would otherwise slice them out of their stack in every solver step. A scan that loops
    keeps the stack.
    """
    if "body" not in params or "0" in params["body"] or unroll < (layers := len(jax.tree.leaves(params["body"])[0])):
        return params
    return {**params, "body": {str(n): jax.tree.map(lambda x, n=n: x[n], params["body"]) for n in range(layers)}}


class ResNetBlock(nn.Module):
    """ResNet block: twice GroupNorm, SiLU and convolution, with a shortcut around both.

    If a time embedding is passed, Linear(SiLU(time)) is added after the first convolution.

    Attributes:
      channels: Channels of the output.
      groups: Groups of the norms.
      dtype: Type of the computation.
      kernel: Size of both convolutions.
      shortcut: Name of the shortcut's 1 x 1 convolution, which exists if the channels change.
      fused_norm: Whether `group_norm` computes each norm and SiLU together, for GPUs.
    """

    channels: int
    groups: int
    dtype: DTypeLike
    kernel: int = 3
    shortcut: str = "shortcut"
    fused_norm: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "n height width c"], time: Float[Array, "n time_width"] | None = None
    ) -> Float[Array, "n height width {self.channels}"]:
        def norm_and_silu(y: Float[Array, "n height width _"], name: str) -> Float[Array, "n height width _"]:
            if self.fused_norm:
                return GroupNormSilu(self.groups, GROUP_NORM_EPS, self.dtype, name=name)(y)
            return silu(group_norm(self.groups, self.dtype, name)(y))

        convolution = functools.partial(conv, self.channels, self.kernel, self.dtype)
        h = convolution(name="conv1")(norm_and_silu(x, "norm1"))
        if time is not None:
            h = h + dense(self.channels, ("time", "conv_out"), self.dtype, name="time")(nn.silu(time))[:, None, None]
        h = convolution(name="conv2")(norm_and_silu(h, "norm2"))
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, self.dtype, name=self.shortcut)(x)
        return x + h
