"""Projections of few tokens by native operators, for float32 inputs without gradients."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.cache_io import EntryLayout


def latent_query(
    x: Tensor, wq_a: Tensor, norm: Tensor, wq_b: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.projection.latent_query`."""
    return native.op("latent_query")(x, wq_a, norm, wq_b, cos, sin, heads, eps)


def packed_key_value(
    x: Tensor, wkv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, eps: float, layout: EntryLayout
) -> Tensor:
    """Implement :func:`kernels.projection.packed_key_value`."""
    return native.op("packed_key_value")(x, wkv, norm, cos, sin, eps, layout.spec)


def grouped_output(attended: Tensor, cos: Tensor, sin: Tensor, wo_a: Tensor, wo_b: Tensor) -> Tensor:
    """Implement :func:`kernels.projection.grouped_output`."""
    return native.op("grouped_output")(attended, cos, sin, wo_a, wo_b)


def index_query(latent: Tensor, wq_b: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Implement :func:`kernels.projection.index_query`."""
    return native.op("index_query")(latent, wq_b, cos, sin, heads)
