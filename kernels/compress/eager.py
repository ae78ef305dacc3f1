"""Gated pooling in PyTorch. The norm, rotations and rounding run on their default backends."""

from __future__ import annotations

from torch import Tensor

from kernels.autocast import in_float32
from kernels.cache_io import EntryLayout, Pages, write_pages
from kernels.compress.inputs import DocumentBlocks, Finish
from kernels.compress.reference import entry_ranges, pooled, pooled_next
from kernels.hadamard import hadamard
from kernels.quantize import round_to_layout
from kernels.rms_norm import rms_norm
from kernels.rotary import rotate


def compress(
    rows: Tensor,
    bias: Tensor,
    finish: Finish,
    overlap: bool,
    has_previous: bool = False,
    blocks: DocumentBlocks | None = None,
    layout: EntryLayout | None = None,
) -> Tensor:
    """Implement :func:`kernels.compress.compress`."""
    return finished(pooled(rows, bias, overlap, has_previous, blocks), finish, layout)


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
    entries = finished(pooled_next(ring, rows, bias, lengths, overlap), finish)
    write_pages(entries, layout, pages, *entry_ranges(lengths, rows.shape[1], len(bias)))


def finished(entries: Tensor, finish: Finish, layout: EntryLayout | None = None) -> Tensor:
    """Normalize, rotate and round pooled entries [B, n, c]."""
    with in_float32(entries):
        x = rotate(rms_norm(entries, finish.norm_eps, finish.norm_weight), finish.cos, finish.sin)
        x = hadamard(x) if finish.hadamard else x
        return x if layout is None else round_to_layout(x, layout)
