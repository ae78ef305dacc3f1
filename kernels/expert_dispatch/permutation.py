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
    counts: Tensor
    """int64 [experts]: rows of each expert, including padding."""


def by_expert(chosen: Tensor, experts: int, multiple: int = 1) -> Dispatch:
    """Group the choices of all tokens by expert. Does not synchronize unless rows are padded.

    Args:
        chosen: int64 [N, K], the experts of every token.
        experts: Number of experts.
        multiple: The rows of every expert are padded to a multiple of this.
    """
    ordered, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(experts, device=order.device), right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    padding = -counts % multiple
    rows = torch.arange(len(order), device=order.device)
    if multiple > 1:
        rows = rows + (padding.cumsum(0) - padding).repeat_interleave(counts, output_size=len(order))
    total = len(order) + (int(padding.sum()) if multiple > 1 else 0)
    row_to_choice, choice_to_row = order.new_full((total,), -1), torch.empty_like(order)
    row_to_choice[rows] = order
    choice_to_row[order] = rows
    row_to_token = row_to_choice.clamp(min=0) // chosen.shape[-1]
    return Dispatch(row_to_choice, choice_to_row.view_as(chosen), row_to_token, counts + padding)
