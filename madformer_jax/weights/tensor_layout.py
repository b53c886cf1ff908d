"""Conversion of tensors between the layouts of PyTorch and Flax.

PyTorch stores convolutions as OIHW and matrices as (out, in). Flax stores HWIO and (in, out).
"""

import numpy as np


def from_torch(tensor: np.ndarray) -> np.ndarray:
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def to_torch(tensor: np.ndarray) -> np.ndarray:
    return tensor.transpose(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that `to_torch` would return, without allocating memory."""
    return to_torch(np.broadcast_to(np.float32(0), shape)).shape
