"""FLOPs of the yardstick, counted as `madformer_jax.cost.flops` counts ours.

PyTorch's counter counts products with the zero padding of a convolution, and the scores that the backward
pass of attention computes again. It does not know the attention kernels of a CPU. `flops` corrects all three.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]
_aten = torch.ops.aten


def _taps(length: int, size: int, stride: int, padding: int) -> int:
    """Counts the pairs of an output and an input position along one axis, without padding."""
    outputs = (length + 2 * padding - size) // stride + 1
    return sum(0 <= o * stride + k - padding < length for o in range(outputs) for k in range(size))


def _convolution(
    x: Shape, kernel: Shape, bias: Shape | None, stride: Shape, padding: Shape, *_: Any, **__: Any
) -> float:
    taps = [_taps(*axis) for axis in zip(x[2:], kernel[2:], stride, padding)]
    return 2.0 * x[0] * taps[0] * taps[1] * kernel[0] * kernel[1]


def _convolution_backward(
    gradient: Shape, x: Shape, kernel: Shape, bias: Shape | None, stride: Shape, padding: Shape, *rest: Any, **__: Any
) -> float:
    needs_input, needs_kernel, _ = rest[-1]
    return (needs_input + needs_kernel) * _convolution(x, kernel, None, stride, padding)


def _attention(q: Shape, k: Shape, *_: Any, **__: Any) -> float:
    batch, heads, queries, size = q
    return 4.0 * batch * heads * queries * k[2] * size


def _attention_backward(gradient: Shape, q: Shape, k: Shape, *_: Any, **__: Any) -> float:
    return 2 * _attention(q, k)


_COUNTS = {
    _aten.convolution: _convolution,
    _aten.convolution_backward: _convolution_backward,
    **{
        getattr(_aten, f"_scaled_dot_product_{kind}{suffix}"): count
        for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
        for suffix, count in (("", _attention), ("_backward", _attention_backward))
    },
}


def flops(run: Callable[[], Any]) -> float:
    """Returns the FLOPs of everything that a function runs. It must not be compiled."""
    with FlopCounterMode(display=False, custom_mapping=_COUNTS) as counter:
        run()
    return float(counter.get_total_flops())
