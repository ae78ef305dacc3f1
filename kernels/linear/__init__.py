"""Matrix products with the weights of a network, which may be BF16 while activations are float32.

The ``cpu`` backend serves few tokens: its time is bound by reading each weight once. It neither rounds inputs nor sums
to BF16. The ``reference`` backend multiplies float32 inputs and BF16 weights in BF16, accumulates in float32 and rounds
the result to BF16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.linear import cpu, reference

__all__ = [
    "BACKENDS",
    "MAX_NATIVE_TOKENS",
    "backend_for",
    "grouped_linear",
    "linear",
    "linear_concat",
    "supports_weight",
]

BACKENDS = {"reference": reference, "cpu": cpu}
MAX_NATIVE_TOKENS = 16
"""Maximum number of tokens of a native product. Library products are faster for more."""


def supports_weight(weight: Tensor) -> bool:
    """Return whether native operators can read ``weight`` in place: float32 or BF16, and every matrix of a stack
    contiguous."""
    is_dense = weight.is_contiguous() or (weight.dim() == 3 and weight[0].is_contiguous())
    return weight.dtype in (torch.float32, torch.bfloat16) and is_dense


def backend_for(x: Tensor, weight: Tensor) -> str:
    """Return the backend for x [..., in] and a weight [out, in] or [g, out, in]."""
    inputs = weight.shape[-1] * (weight.shape[0] if weight.dim() == 3 else 1)
    is_small = x.numel() <= MAX_NATIVE_TOKENS * inputs
    is_supported = supports_weight(weight) and not torch.is_autocast_enabled("cpu")
    return "cpu" if is_small and is_supported and native.serves(x) else "reference"


def linear(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    """Return ``x @ weight.T``.

    Args:
        x: [..., in]. The ``cpu`` backend requires float32 and disabled gradients.
        weight: [out, in], float32 or BF16.

    Returns:
        [..., out] in the dtype of x, or in the dtype of autocast where it is enabled.
    """
    return get_backend(BACKENDS, backend or backend_for(x, weight)).linear(x, weight)


def linear_concat(x: Tensor, weights: Sequence[Tensor], backend: str | None = None) -> Tensor:
    """Concatenate the products of x [..., in] with several weights [out_i, in]: [..., sum of out_i].

    Runs natively if :func:`backend_for` is ``cpu`` for every weight.
    """
    if backend is None:
        backend = "cpu" if all(backend_for(x, weight) == "cpu" for weight in weights) else "reference"
    return get_backend(BACKENDS, backend).linear_concat(x, weights)


def grouped_linear(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    """Multiply every group of inputs by its own weight: x [..., g * in] and weight [g, out, in] to [..., g * out].

    ``weight`` may be a view of every group's first or last rows.
    """
    return get_backend(BACKENDS, backend or backend_for(x, weight)).grouped_linear(x, weight)
