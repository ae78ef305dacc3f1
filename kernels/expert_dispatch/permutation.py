"""Order of rows grouped by expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """Rows of N tokens with K experts each, grouped by expert."""

    picks: Tensor
    """int64 [rows]: index of the row's choice in the flattened choices [N * K]; -1 for padding."""
    places: Tensor
    """int64 [N, K]: the row of each choice."""
    tokens: Tensor
    """int64 [rows]: the token of each row; 0 for padding."""
    counts: list[int]
    """Rows of each expert, including padding."""


def by_expert(chosen: Tensor, experts: int, multiple: int = 1) -> Dispatch:
    """Group the choices of all tokens by expert.

    Args:
        chosen: int64 [N, K], the experts of every token.
        experts: Number of experts.
        multiple: The rows of every expert are padded to a multiple of this.
    """
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    padding = -counts % multiple
    offsets = padding.cumsum(0) - padding
    sizes: list[int] = (counts + padding).tolist()
    picks, places = order.new_full((sum(sizes),), -1), torch.empty_like(order)
    rows = torch.arange(len(order), device=order.device) + offsets.repeat_interleave(counts)
    picks[rows] = order
    places[order] = rows
    return Dispatch(picks, places.view_as(chosen), picks.clamp(min=0) // chosen.shape[-1], sizes)
