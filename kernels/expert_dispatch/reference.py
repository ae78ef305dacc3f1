"""Dispatch to experts and combination, in eager PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """Which rows the experts get, one expert after the other, for N tokens that chose K experts each."""

    picks: Tensor
    """int64 [rows]: the place in the flattened choices [N * K] that a row stands for; -1 in rows that fill up."""
    places: Tensor
    """int64 [N, K]: the row of each choice."""
    tokens: Tensor
    """int64 [rows]: whose row it is. Rows that fill up are the first token's, and nobody combines them."""
    counts: list[int]
    """Rows of each expert."""


def by_expert(chosen: Tensor, experts: int, multiple: int = 1) -> Dispatch:
    """The rows for ``chosen``, int64 [N, K] out of ``experts``, filled up to a ``multiple`` for each."""
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    missing = -counts % multiple
    before = missing.cumsum(0) - missing
    sizes: list[int] = (counts + missing).tolist()
    picks, places = order.new_full((sum(sizes),), -1), torch.empty_like(order)
    filled = torch.arange(len(order), device=order.device) + before.repeat_interleave(counts)
    picks[filled] = order
    places[order] = filled
    return Dispatch(picks, places.view_as(chosen), picks.clamp(min=0) // chosen.shape[-1], sizes)


def dispatch(x: Tensor, to: Dispatch, dtype: torch.dtype) -> Tensor:
    """Every row's token, from x [N, d]: [rows, d] in ``dtype``. What is done with rows that fill up has no gradient."""
    return x.to(dtype).index_select(0, to.tokens)


def combine(rows: Tensor, to: Dispatch, dtype: torch.dtype) -> Tensor:
    """Every token's sum over its rows, of rows [rows, d]: [N, d], summed up in ``dtype``.

    Rows that fill up are left out, and their gradient means nothing: it is to be stopped where the rows are made.
    """
    return rows.index_select(0, to.places.flatten()).unflatten(0, to.places.shape).sum(1, dtype=dtype)
