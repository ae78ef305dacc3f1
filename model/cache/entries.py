"""Growing parts of a layer's cache: packed rows in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cache_io import Pages, write_pages
from model.cache.pages import PageTable


class PagedEntries:
    """A growing part: packed rows in the pages of all sequences."""

    def __init__(self, table: PageTable, layer: int, name: str):
        self.table, self.layer, self.name = table, layer, name
        part = table.pool.parts[layer, name]
        self.layout, self.ratio = part.layout, part.ratio
        self.per_page = table.pool.page_tokens // part.ratio

    @property
    def _rows(self) -> Tensor:
        return self.table.pool.rows(self.layer, self.name)

    def append(self, x: Tensor) -> None:
        """Append new entries, float [B, n, size]. A sequence keeps the entries that its new tokens complete."""
        if not x.shape[1]:
            return
        write_pages(x, self.layout, self.pages, *self.table.entry_ranges(self.ratio))

    @property
    def counts(self) -> list[int]:
        """Number of entries of each sequence, including those of the current step."""
        return self.table.entry_counts(self.ratio)[1]

    @property
    def pages(self) -> Pages:
        """The rows of all sequences in place, by page."""
        return Pages(self._rows, self.per_page, self.table.page_ids)

    def _pool_rows(self) -> Tensor:
        """Return the pool row of each entry of a single sequence."""
        (count,) = self.table.entry_counts(self.ratio)[0]
        entries = torch.arange(count, device=self.table.pool.device)
        return self.table.page_ids[0][entries // self.per_page] * self.per_page + entries % self.per_page

    def saved(self) -> dict[str, Tensor]:
        """Return the rows in use of a single sequence, uint8 [T, layout.nbytes], by name."""
        return {"": self._rows[self._pool_rows()]}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors of :meth:`saved` for a sequence of the same length."""
        self._rows[self._pool_rows()] = tensors[""]
