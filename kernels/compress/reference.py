"""Pooling of blocks in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cache_io import EntryLayout, Pages, write_pages
from kernels.compress.inputs import DocumentBlocks, Finish
from kernels.hadamard import hadamard
from kernels.quantize import round_to_layout
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
    entries = finished(pooled(rows, bias, overlap, has_previous, blocks), finish)
    return entries if layout is None else round_to_layout(entries, layout, backend="reference")


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
    entries = pooled_next(ring, rows, bias, lengths, overlap)
    if entries.shape[1]:
        counts = entry_ranges(lengths, rows.shape[1], len(bias))
        write_pages(finished(entries, finish), layout, pages, *counts, backend="reference")


def finished(entries: Tensor, finish: Finish) -> Tensor:
    """Normalize and rotate pooled entries [B, n, c]."""
    inverse_rms = torch.rsqrt(entries.square().mean(-1, keepdim=True) + finish.norm_eps)
    rotated = rotate(entries * inverse_rms * finish.norm_weight, finish.cos, finish.sin, backend="reference")
    return hadamard(rotated, backend="reference") if finish.hadamard else rotated


def most_completed(new: int, m: int) -> int:
    """Return how many blocks of ``m`` tokens ``new`` tokens can complete."""
    return -(-new // m)


def entry_ranges(lengths: Tensor, new: int, m: int) -> tuple[Tensor, Tensor]:
    """Return each sequence's number of entries of ``m`` tokens before and after ``new`` tokens."""
    return lengths // m, (lengths + new) // m


def pooled(
    rows: Tensor, bias: Tensor, overlap: bool, has_previous: bool, blocks: DocumentBlocks | None = None
) -> Tensor:
    """Pool blocks, as :func:`kernels.compress.compress`, to entries [B, n, c] before their norm."""
    if blocks is None:
        return _pooled(rows, bias, overlap, has_previous)
    tokens = (blocks.first.clamp(min=0).unsqueeze(-1) + torch.arange(len(bias), device=rows.device)).flatten(1)
    gathered = rows.gather(1, tokens.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
    entries = _pooled(gathered, bias, overlap, has_previous, blocks.starts)
    return entries.masked_fill((blocks.first < 0).unsqueeze(-1), 0.0)


def _pooled(rows: Tensor, bias: Tensor, overlap: bool, has_previous: bool, starts: Tensor | None = None) -> Tensor:
    """Pool adjacent blocks. Those in ``starts``, bool [B, n], have no predecessor."""
    m = bias.shape[0]
    values, gates = rows.chunk(2, dim=-1)
    values = values.unflatten(1, (-1, m))  # [B, n, m, w]
    gates = gates.unflatten(1, (-1, m)) + bias
    if not overlap:
        return (gates.softmax(dim=2) * values).sum(dim=2)
    c = bias.shape[1] // 2
    # Shift the overlap channels by one block: those of block i - 1 join block i.
    previous_values = F.pad(values[..., :c], (0, 0, 0, 0, 1, 0))[:, :-1]
    previous_gates = F.pad(gates[..., :c], (0, 0, 0, 0, 1, 0), value=float("-inf"))[:, :-1]
    if starts is not None:
        previous_gates = previous_gates.masked_fill(starts[:, :, None, None], float("-inf"))
    weights = torch.cat((previous_gates, gates[..., c:]), dim=2).softmax(dim=2)
    entries = (weights * torch.cat((previous_values, values[..., c:]), dim=2)).sum(dim=2)
    return entries[:, 1:] if has_previous else entries


def pooled_next(ring: Tensor, rows: Tensor, bias: Tensor, lengths: Tensor, overlap: bool) -> Tensor:
    """Pool the blocks that new tokens complete, as :func:`kernels.compress.compress_next`, to entries [B, n, c] before
    their norm, where n is the most that they can complete. A sequence has its own first, followed by zeros."""
    (B, new), capacity, device = rows.shape[:2], ring.shape[1], rows.device
    m, width = bias.shape[0], bias.shape[1] // (2 if overlap else 1)
    n = most_completed(new, m)
    if not B * n:
        return rows.new_zeros(B, 0, width)
    length = lengths.expand(B).view(B, 1, 1)
    block = length // m + torch.arange(n, device=device).view(1, n, 1)
    position = block * m + torch.arange(-m if overlap else 0, m, device=device)
    is_complete = (block + 1) * m <= length + new
    place = torch.where(position < length, position % capacity, capacity + position - length)
    place = torch.where(is_complete & (position >= 0), place, capacity)  # a row that exists, but is not used
    gathered = torch.cat((ring, rows), dim=1)[torch.arange(B, device=device).view(B, 1, 1), place].flatten(0, 1)
    starts = None
    if overlap:  # the first block of a sequence has none before it
        starts = (block == 0).view(B * n, 1).expand(-1, 2)
    entries = _pooled(gathered, bias, overlap, overlap, starts).view(B, n, width)
    return entries.masked_fill(~is_complete, 0.0)
