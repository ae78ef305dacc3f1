"""Rows of one sequence that lie in pages of a shared storage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PagedRows:
    """``storage`` uint8 [all rows, nbytes], page after page of ``per_page`` rows; ``pages``: the sequence's own, in
    order. Row i of the sequence is row ``i % per_page`` of page ``pages[i // per_page]``."""

    storage: Tensor
    per_page: int
    pages: list[int]
    in_a_row: bool
    """Whether the pages lie one after the other, so that slices need no copy."""

    @cached_property
    def _numbers(self) -> Tensor:
        return torch.tensor(self.pages, device=self.storage.device)

    def slice(self, begin: int, end: int) -> Tensor:
        """Rows ``begin`` to ``end``: uint8 [end - begin, nbytes]."""
        if self.in_a_row:
            first = self.pages[0] * self.per_page if self.pages else 0
            return self.storage[first + begin : first + end]
        first, last = begin // self.per_page, -(-end // self.per_page)
        whole = self.storage.view(-1, self.per_page, self.storage.shape[1])[self._numbers[first:last]]
        return whole.flatten(0, 1)[begin - first * self.per_page :][: end - begin]

    def at_least(self, begin: int, end: int) -> Tensor:
        """Just as many rows where the sequence's pages end before ``end``: those beyond them are some
        sequence's, or zeros, and finite once unpacked."""
        missing = end - len(self.pages) * self.per_page
        if missing <= 0:
            return self.slice(begin, end)
        first = self.pages[0] * self.per_page if self.pages else 0
        if self.in_a_row and first + end <= len(self.storage):
            return self.storage[first + begin : first + end]
        return F.pad(self.slice(begin, end - missing), (0, 0, 0, missing))
