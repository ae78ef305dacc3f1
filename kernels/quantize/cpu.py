"""Rounding to a storage format by a native operator."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.autocast import cast, detached
from kernels.cache_io import EntryLayout


def round_to_format(x: Tensor, fmt: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Implement :func:`kernels.quantize.round_to_format`."""
    return round_to_layout(cast(x, torch.float32), EntryLayout(x.shape[-1], fmt)).to(dtype)


def round_to_layout(x: Tensor, layout: EntryLayout) -> Tensor:
    """Implement :func:`kernels.quantize.round_to_layout` for float32 x, without a gradient."""
    return native.op("round_to_layout")(detached(x), layout.spec)
