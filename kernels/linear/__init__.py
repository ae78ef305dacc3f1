"""Products with a network's weights, which may be stored in BF16 while activations are float32.

For few tokens a native operator reads each weight once (``cpu.cpp``); otherwise ``reference.py`` runs.
``backend=`` forces one and :func:`backend_for` tells which one runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import native
from kernels.linear import cpu, reference

BACKENDS = {"reference": reference, "cpu": cpu}
FEW_TOKENS = 8
"""Most tokens of a native product, which is bound by weight reads; library products are tuned for more."""


def is_stored_plainly(weight: Tensor) -> bool:
    """Return whether native operators can read the weight in place."""
    return weight.dtype in (torch.float32, torch.bfloat16) and weight.is_contiguous()


def backend_for(x: Tensor, weight: Tensor) -> str:
    inputs = weight.shape[-1] * (weight.shape[0] if weight.dim() == 3 else 1)
    few = x.numel() <= FEW_TOKENS * inputs
    plain = is_stored_plainly(weight) and not torch.is_autocast_enabled("cpu")
    return "cpu" if few and plain and native.serves(x) else "reference"


def linear(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    """See :func:`kernels.linear.reference.linear`."""
    return BACKENDS[backend or backend_for(x, weight)].linear(x, weight)


def linear_concat(x: Tensor, weights: Sequence[Tensor], backend: str | None = None) -> Tensor:
    """See :func:`kernels.linear.reference.linear_concat`."""
    runs = {backend_for(x, weight) for weight in weights}
    return BACKENDS[backend or ("cpu" if runs == {"cpu"} else "reference")].linear_concat(x, weights)


def grouped_linear(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    """See :func:`kernels.linear.reference.grouped_linear`."""
    return BACKENDS[backend or backend_for(x, weight)].grouped_linear(x, weight)


__all__ = [
    "BACKENDS",
    "FEW_TOKENS",
    "backend_for",
    "grouped_linear",
    "is_stored_plainly",
    "linear",
    "linear_concat",
]
