"""Matrix products with few tokens by native operators."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels import native


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Implement :func:`kernels.linear.linear` for float32 x, without gradients."""
    return native.op("linear")(x, [weight])


def linear_concat(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Implement :func:`kernels.linear.linear_concat` for float32 x, without gradients."""
    return native.op("linear")(x, list(weights))


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Implement :func:`kernels.linear.grouped_linear` for float32 x, without gradients."""
    return native.op("grouped_linear")(x, weight)
