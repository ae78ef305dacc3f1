"""Order of rows grouped by expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """Rows of N tokens with K experts each, grouped by expert."""

    row_to_choice: Tensor
    """int64 [rows]: index of the row's choice in the flattened choices [N * K]; -1 for padding."""
    choice_to_row: Tensor
    """int64 [N, K]: the row of each choice."""
    row_to_token: Tensor
    """int64 [rows]: the token of each row; 0 for padding."""
    rows_per_expert: list[int]
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
    row_to_choice, choice_to_row = order.new_full((sum(sizes),), -1), torch.empty_like(order)
    rows = torch.arange(len(order), device=order.device) + offsets.repeat_interleave(counts)
    row_to_choice[rows] = order
    choice_to_row[order] = rows
    return Dispatch(row_to_choice, choice_to_row.view_as(chosen), row_to_choice.clamp(min=0) // chosen.shape[-1], sizes)
