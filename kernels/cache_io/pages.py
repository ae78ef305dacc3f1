"""Packed rows of sequences, stored in pages of a shared pool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pages:
    """Rows of a batch of sequences.

    Row i of a sequence is row ``i % page_size`` of page ``page_table[sequence, i // page_size]``.
    """

    storage: Tensor
    """uint8 [rows of all pages, nbytes]"""
    page_size: int
    """Rows per page."""
    page_table: Tensor
    """int64 [B, P]: the page numbers of each sequence, in order."""

    def shapes(self, sequences: int, nbytes: int) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
        """Return each tensor with its required shape, for ``require_shapes``."""
        return {
            "storage": (self.storage, (len(self.storage), nbytes)),
            "page_table": (self.page_table, (sequences, *self.page_table.shape[1:2])),
        }

    def storage_rows(self, rows: Tensor) -> Tensor:
        """Return the indices in the storage of rows int64 [B, ...] of each sequence."""
        pages = self.page_table.gather(1, (rows // self.page_size).flatten(1)).view_as(rows)
        return pages * self.page_size + rows % self.page_size

    def gather(self, rows: Tensor) -> Tensor:
        """Return rows int64 [B, ...] of each sequence: uint8 [B, ..., nbytes]. Reads no other rows."""
        return self._read(self.storage_rows(rows))

    def gather_range(self, begin: int, end: int, counts: Tensor) -> Tensor:
        """Return rows ``begin`` to ``end`` of each sequence: uint8 [B, end - begin, nbytes].

        ``counts``, int64 [B], is the number of valid rows per sequence. Indices past it are clamped to the last valid
        row; callers must mask them.
        """
        rows = torch.arange(begin, end, device=counts.device)
        return self.gather(rows.minimum(counts.unsqueeze(-1) - 1).clamp(min=0))

    def gather_from(self, sequences: Tensor, rows: Tensor) -> Tensor:
        """Return rows int64 [N, k] of sequences int64 [N]: uint8 [N, k, nbytes]."""
        pages = self.page_table[sequences.unsqueeze(-1), rows // self.page_size]
        return self._read(pages * self.page_size + rows % self.page_size)

    def _read(self, indices: Tensor) -> Tensor:
        """Return rows int64 [...] of the storage: uint8 [..., nbytes]."""
        # index_select is ten times as fast on a CPU as indexing, which copies byte by byte.
        return self.storage.index_select(0, indices.flatten()).view(*indices.shape, self.storage.shape[1])
