"""Rotary positions by native operators."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.autocast import cast


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """:func:`kernels.rotary.reference.rotate` for float32 x without gradients."""
    return native.op("rotate")(x, cos, sin, inverse)


def angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`kernels.rotary.reference.angles`."""
    return native.op("angles")(cast(positions, torch.int64), frequencies)
