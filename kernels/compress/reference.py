"""Gated pooling, in eager PyTorch (report eq. 9-12 with overlap, 20-23 without)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compress(
    rows: Tensor, bias: Tensor, overlap: bool, has_previous: bool = False, starts: Tensor | None = None
) -> Tensor:
    """Pool whole blocks of ``m`` tokens with a softmax per channel.

    rows: float32 [B, n * m, 2w], values beside gates, of n whole blocks. bias: [m, w], added to the gates by place in
    block.
    Without overlap w = c and an entry pools the m rows of its block. With overlap w = 2c: channels [c:] belong to the
    row's own block, channels [:c] to the block after it, so an entry pools 2m rows; the sequence's first block has no
    predecessor, and neither has one that ``starts`` (bool [B, n], packed documents) marks. ``has_previous`` says that
    the first block given is only the predecessor of the second: it gets no entry of its own.

    Returns float32 [B, n, c] (or [B, n - 1, c] with ``has_previous``).
    """
    m = bias.shape[0]
    values, gates = rows.chunk(2, dim=-1)
    values = values.unflatten(1, (-1, m))  # [B, n, m, w]
    gates = gates.unflatten(1, (-1, m)) + bias
    if not overlap:
        return (gates.softmax(dim=2) * values).sum(dim=2)
    c = bias.shape[1] // 2
    # One block later: the overlap series of block i - 1 joins block i.
    previous_values = F.pad(values[:, :-1, :, :c], (0, 0, 0, 0, 1, 0))
    previous_gates = F.pad(gates[:, :-1, :, :c], (0, 0, 0, 0, 1, 0), value=float("-inf"))
    if starts is not None:
        previous_gates = previous_gates.masked_fill(starts[:, :, None, None], float("-inf"))
    weights = torch.cat((previous_gates, gates[..., c:]), dim=2).softmax(dim=2)
    entries = (weights * torch.cat((previous_values, values[..., c:]), dim=2)).sum(dim=2)
    return entries[:, 1:] if has_previous else entries
