"""Walsh-Hadamard rotation as a product with the Hadamard matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MATRICES: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}


def hadamard(x: Tensor) -> Tensor:
    """Implement :func:`kernels.hadamard.hadamard`."""
    return x @ _hadamard_matrix(x.shape[-1], x.device, x.dtype)


def _hadamard_matrix(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    key = (n, device, dtype)
    if key not in _MATRICES:
        if n < 1 or n & (n - 1):
            raise ValueError(f"hadamard: the last dim must be a power of two, found {n}")
        with torch.inference_mode(False):  # later calls may need gradients through the cached matrix
            matrix = torch.ones(1, 1)
            while matrix.shape[0] < n:
                matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
            _MATRICES[key] = (matrix / math.sqrt(n)).to(device, dtype)
    return _MATRICES[key]
