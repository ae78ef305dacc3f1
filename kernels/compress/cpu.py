"""Gated pooling by native operators. For whole sequences, the norm, rotations and rounding are separate operators."""

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
    native.op("compress_next")(
        *(ring, rows, bias, lengths, overlap),
        *(finish.norm_weight, finish.norm_eps, finish.cos, finish.sin, finish.hadamard),
        *(pages.storage, pages.page_table, pages.page_size, layout.spec),
    )
