"""Gated pooling by a native operator. The norm, rotations and rounding use their own operators."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.cache_io import EntryLayout, Pages
from kernels.compress import eager
from kernels.compress.inputs import DocumentBlocks, Finish


def compress(
    rows: Tensor,
    bias: Tensor,
    finish: Finish,
    overlap: bool,
    has_previous: bool = False,
    blocks: DocumentBlocks | None = None,
    layout: EntryLayout | None = None,
) -> Tensor:
    """Implement :func:`kernels.compress.compress` without gradients. Raises ValueError for packed documents."""
    if blocks is not None:
        raise ValueError("compress: the cpu backend does not support packed documents")
    return eager.finished(native.op("compress")(rows, bias, overlap, has_previous), finish, layout)


def compress_next(
    ring: Tensor,
    rows: Tensor,
    bias: Tensor,
    finish: Finish,
    lengths: Tensor,
    overlap: bool,
    layout: EntryLayout,
    pages: Pages,
) -> None:
    """Implement :func:`kernels.compress.compress_next`."""
    entries = native.op("compress_next")(ring, rows, bias, lengths, overlap)
    eager.write(entries, finish, lengths, rows.shape[1], len(bias), layout, pages)
