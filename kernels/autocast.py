"""Helpers for operations that control their dtypes under ``torch.autocast``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NO_CONTEXT = nullcontext()


def _device_type(x: Tensor) -> str:
    return "cpu" if x.is_cpu else x.device.type  # called about 60 times per decoded token, and x.device is slow


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with ``x``: that of autocast if it is enabled, else that of ``x``."""
    device = _device_type(x)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x.to(dtype)``. Skips the call, which costs as much as a small operator, if the dtype is right."""
    return x if x.dtype == dtype else x.to(dtype)


def detached(x: Tensor) -> Tensor:
    """Return ``x.detach()``. Skips the call if ``x`` requires no gradient."""
    return x.detach() if x.requires_grad else x


def in_float32(x: Tensor) -> AbstractContextManager:
    """Return a context that disables autocast on the device of ``x``.

    Routing, selection and mixing weights need it: in lower precision, training would choose differently from inference.
    """
    device = _device_type(x)
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NO_CONTEXT
