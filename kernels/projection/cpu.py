"""An attention layer's projections of a few tokens by native operators."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.cache_io import EntryLayout


def latent_query(
    x: Tensor, wq_a: Tensor, norm: Tensor, wq_b: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`kernels.projection.reference.latent_query` for float32 x without gradients."""
    return native.op("latent_query")(x, wq_a, norm, wq_b, cos, sin, heads, eps)


def packed_key_value(
    x: Tensor, wkv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, eps: float, layout: EntryLayout
) -> Tensor:
    """:func:`kernels.projection.reference.packed_key_value`, likewise."""
    return native.op("packed_key_value")(x, wkv, norm, cos, sin, eps, layout.spec)


def grouped_output(mixed: Tensor, cos: Tensor, sin: Tensor, wo_a: Tensor, wo_b: Tensor) -> Tensor:
    """:func:`kernels.projection.reference.grouped_output`, likewise."""
    return native.op("grouped_output")(mixed, cos, sin, wo_a, wo_b)


def index_query(latent: Tensor, wq_b: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """:func:`kernels.projection.reference.index_query`, likewise."""
    return native.op("index_query")(latent, wq_b, cos, sin, heads)
