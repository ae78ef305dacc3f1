"""Gated pooling in PyTorch."""

from __future__ import annotations

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
    m, new, capacity = bias.shape[0], rows.shape[1], ring.shape[1]
    sequences = []
    for kept, own, length in zip(ring, rows, lengths):
        preceded = overlap and length >= m
        start = length // m * m - m * preceded
        past = kept[torch.arange(start, length, device=kept.device) % capacity]
        whole = torch.cat((past, own))[: (length + new) // m * m - start]
        complete = (length + new) // m > length // m
        sequences.append(compress(whole.unsqueeze(0), bias, overlap, preceded)[0] if complete else None)
    n = max((len(entries) for entries in sequences if entries is not None), default=0)
    width = bias.shape[1] // 2 if overlap else bias.shape[1]
    empty = rows.new_zeros(0, width)
    padded = [F.pad(empty if entries is None else entries, (0, 0, 0, n)) for entries in sequences]
    return torch.stack([entries[:n] for entries in padded])
