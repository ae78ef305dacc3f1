"""Gated pooling by a native operator."""

from __future__ import annotations

from torch import Tensor

from kernels import native


def compress(
    rows: Tensor, bias: Tensor, overlap: bool, has_previous: bool = False, starts: Tensor | None = None
) -> Tensor:
    """Implement :func:`kernels.compress.compress` without gradients. Raises ValueError for packed documents."""
    if starts is not None:
        raise ValueError("compress: the cpu backend does not support packed documents")
    return native.op("compress")(rows, bias, overlap, has_previous)


def compress_next(ring: Tensor, rows: Tensor, bias: Tensor, lengths: list[int], overlap: bool) -> Tensor:
    """Implement :func:`kernels.compress.compress_next` without gradients."""
    return native.op("compress_next")(ring, rows, bias, lengths, overlap)
