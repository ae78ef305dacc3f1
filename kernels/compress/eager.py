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
    write(pooled_next(ring, rows, bias, lengths, overlap), finish, lengths, rows.shape[1], len(bias), layout, pages)


def finished(entries: Tensor, finish: Finish, layout: EntryLayout | None = None) -> Tensor:
    """Normalize, rotate and round pooled entries [B, n, c]."""
    with in_float32(entries):
        x = rotate(rms_norm(entries, finish.norm_eps, finish.norm_weight), finish.cos, finish.sin)
        x = hadamard(x) if finish.hadamard else x
        return x if layout is None else round_to_layout(x, layout)


def write(
    entries: Tensor, finish: Finish, lengths: Tensor, new: int, m: int, layout: EntryLayout, pages: Pages
) -> None:
    """Write the entries that ``new`` tokens complete, of ``m`` tokens each, to pages."""
    if n := entries.shape[1]:
        if n < finish.cos.shape[1]:
            finish = finish._replace(cos=finish.cos[:, :n], sin=finish.sin[:, :n])
        write_pages(finished(entries, finish), layout, pages, *entry_ranges(lengths, new, m))
