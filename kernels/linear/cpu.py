"""Products of a few tokens by native operators."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels import native


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`kernels.linear.reference.linear` for float32 x without gradients."""
    return native.op("linear")(x, [weight])


def linear_concat(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """:func:`kernels.linear.reference.linear_concat`, likewise."""
    return native.op("linear")(x, list(weights))


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`kernels.linear.reference.grouped_linear`, likewise."""
    return native.op("grouped_linear")(x, weight)
