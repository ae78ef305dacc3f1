"""Packed rows: several documents per training row, separated by masks (report 4.1: sample-level masks)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.compress import DocumentBlocks
from kernels.entry_ranges import EntryRanges


class CompressionBlocks(NamedTuple):
    """Complete compression blocks of each row's documents."""

    blocks: DocumentBlocks
    """Blocks of B rows, padded to n per row."""
    positions: Tensor
    """int64 [B, n]: position of each block's first token in its document."""
    visible: EntryRanges
    """Blocks that each token sees: those of its document that are complete at it."""


class PackedDocuments:
    """Rows of documents with ``positions`` int64 [B, S] in the documents: 0 starts a document, -1 is padding.

    Each padding token is treated as a separate document and is False in ``counted``. Raises ValueError if a position
    neither starts nor continues a document.
    """

    def __init__(self, positions: Tensor):
        before = torch.cat((positions.new_full((positions.shape[0], 1), -1), positions[:, :-1]), dim=1)
        continues = (positions == before + 1) | (positions == 0) | (positions == -1)
        if not continues.all():
            row, place = (~continues).nonzero()[0].tolist()
            found, next_place = int(positions[row, place]), int(before[row, place]) + 1
            raise ValueError(
                f"positions[{row}, {place}]: expected 0 (a new document), -1 (padding) or {next_place}, found {found}"
            )
        self.counted = positions >= 0
        self.positions = positions.clamp(min=0)
        self._blocks: dict[int, CompressionBlocks] = {}

    def causal_mask(self) -> Tensor:
        """Return bool [B, S, S]: whether tokens i and j belong to one document and j <= i."""
        index = torch.arange(self.positions.shape[1], device=self.positions.device)
        first = (index - self.positions).unsqueeze(-1)
        return (index <= index.unsqueeze(-1)) & (index >= first)

    def blocks(self, ratio: int) -> CompressionBlocks:
        """Return the blocks of ``ratio`` >= 2 tokens, aligned to the start of each document. A document's last tokens
        belong to no block if they do not fill one."""
        if ratio not in self._blocks:
            self._blocks[ratio] = self._cut(ratio)
        return self._blocks[ratio]

    def _cut(self, ratio: int) -> CompressionBlocks:
        B, S = self.positions.shape
        device = self.positions.device
        ends = (self.positions + 1) % ratio == 0
        complete = ends.cumsum(dim=1)  # [B, S]: blocks of the row complete at each token
        n = int(complete[:, -1].max()) if S else 0
        rows, last = ends.nonzero(as_tuple=True)
        first = torch.full((B, n), -1, device=device)
        first[rows, complete[rows, last] - 1] = last - (ratio - 1)
        own = (self.positions + 1) // ratio  # blocks of the token's document complete at it
        positions = self.positions.gather(1, first.clamp(min=0))
        return CompressionBlocks(
            DocumentBlocks(first, positions == 0), positions, EntryRanges(complete - own, complete)
        )
