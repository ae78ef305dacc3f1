"""Rows of sequences that lie in pages of a shared storage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pages:
    """``storage`` uint8 [all rows, nbytes], page after page of ``per_page`` rows; ``numbers`` int64 [B, P]: each
    sequence's own pages, in order. Row i of a sequence is row ``i % per_page`` of its page ``i // per_page``."""

    storage: Tensor
    per_page: int
    numbers: Tensor

    def gather(self, rows: Tensor) -> Tensor:
        """Rows int64 [B, ...] -> uint8 [B, ..., nbytes]. Only these are touched."""
        pages = self.numbers.gather(1, (rows // self.per_page).flatten(1)).view_as(rows)
        return self.take(pages * self.per_page + rows % self.per_page)

    def gather_of(self, sequences: Tensor, rows: Tensor) -> Tensor:
        """Rows int64 [N, k] of single sequences int64 [N] -> uint8 [N, k, nbytes]."""
        pages = self.numbers[sequences.unsqueeze(-1), rows // self.per_page]
        return self.take(pages * self.per_page + rows % self.per_page)

    def take(self, places: Tensor) -> Tensor:
        """Rows of the storage, int64 [...] -> uint8 [..., nbytes]."""
        # Ten times as fast on a CPU as indexing, which copies byte by byte.
        return self.storage.index_select(0, places.flatten()).view(*places.shape, self.storage.shape[1])


@dataclass(frozen=True)
class PagedRows:
    """One sequence of a :class:`Pages`: ``pages`` are its own, in order."""

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
