"""What ``torch.autocast`` means to parts that choose the types of their products themselves."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which products with ``x`` are taken here: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)`` without the call where nothing changes: one takes as long as a small operator."""
    return x if x.dtype == dtype else x.to(dtype)


def detached(x: Tensor) -> Tensor:
    """``x.detach()``, likewise."""
    return x.detach() if x.requires_grad else x


def in_float32(x: Tensor) -> AbstractContextManager:
    """A context in which autocast is off for x's device: for what decides (routes, selections, mixing weights), which
    would decide otherwise in training than in inference."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
