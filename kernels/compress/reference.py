"""Gated pooling in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def compress(
    rows: Tensor, bias: Tensor, overlap: bool, has_previous: bool = False, starts: Tensor | None = None
) -> Tensor:
    """Implement :func:`kernels.compress.compress`."""
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


def compress_next(ring: Tensor, rows: Tensor, bias: Tensor, lengths: list[int], overlap: bool) -> Tensor:
    """Implement :func:`kernels.compress.compress_next`."""
    return pool_next(compress, ring, rows, bias, lengths, overlap)


def pool_next(
    pool: Callable[..., Tensor], ring: Tensor, rows: Tensor, bias: Tensor, lengths: list[int], overlap: bool
) -> Tensor:
    """Gather the blocks that new tokens complete and pool each with ``pool``, an implementation of
    :func:`kernels.compress.compress`."""
    (B, new), capacity, device = rows.shape[:2], ring.shape[1], rows.device
    m, width = bias.shape[0], bias.shape[1] // (2 if overlap else 1)
    n = max(((length + new) // m - length // m for length in lengths), default=0)
    if not n:
        return rows.new_zeros(B, 0, width)
    length = torch.tensor(lengths, device=device).view(B, 1, 1)
    block = length // m + torch.arange(n, device=device).view(1, n, 1)
    position = block * m + torch.arange(-m if overlap else 0, m, device=device)
    is_complete = (block + 1) * m <= length + new
    place = torch.where(position < length, position % capacity, capacity + position - length)
    place = torch.where(is_complete & (position >= 0), place, capacity)  # a row that exists, but is not used
    gathered = torch.cat((ring, rows), dim=1)[torch.arange(B, device=device).view(B, 1, 1), place].flatten(0, 1)
    starts = None
    if overlap:  # the first block of a sequence has none before it
        starts = (block == 0).view(B * n, 1).expand(-1, 2)
    entries = pool(gathered, bias, overlap, overlap, starts).view(B, n, width)
    return entries.masked_fill(~is_complete, 0.0)
