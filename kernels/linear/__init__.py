"""Products with a network's weights, which may be stored in BF16 while activations are float32.

Of a few tokens a native operator reads the weights once (``cpu.cpp``); all else runs as in ``reference.py``.
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
"""Products of at most so many tokens are bound by reading the weights, and a library's code is made for more."""


def is_stored_plainly(weight: Tensor) -> bool:
    """Whether native operators can read the weight where it lies."""
    return weight.dtype in (torch.float32, torch.bfloat16) and weight.is_contiguous()


def backend_for(x: Tensor, weight: Tensor) -> str:
    inputs = weight.shape[-1] * (weight.shape[0] if weight.dim() == 3 else 1)
    few = x.numel() <= FEW_TOKENS * inputs
    return "cpu" if few and is_stored_plainly(weight) and native.serves(x) else "reference"


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
