"""Entries that the queries of whole sequences may use."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class EntryRanges(NamedTuple):
    """Consecutive entries per query, those from ``first`` up to, but not including, ``end``. Neither decreases
    from a query to the next one."""

    first: Tensor
    """int64 [B or 1, S]"""
    end: Tensor
    """int64 [B or 1, S]"""

    def of(self, queries: slice) -> EntryRanges:
        """Return the ranges of some of the queries."""
        return EntryRanges(self.first[:, queries], self.end[:, queries])

    def mask(self, entries: int) -> Tensor:
        """Return which of the first ``entries`` entries the queries may use: bool [B or 1, S, entries]."""
        entry = torch.arange(entries, device=self.end.device)
        return (entry >= self.first.unsqueeze(-1)) & (entry < self.end.unsqueeze(-1))
