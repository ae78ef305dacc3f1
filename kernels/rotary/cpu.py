"""Rotary position embedding by native operators."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.autocast import cast


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Implement :func:`kernels.rotary.rotate` for float32 x, without gradients."""
    return native.op("rotate")(x, cos, sin, inverse)


def angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.rotary.angles`."""
    return native.op("angles")(cast(positions, torch.int64), frequencies)
