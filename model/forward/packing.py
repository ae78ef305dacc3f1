"""Several documents in one row: who belongs together, for training on packed rows (report 4.1: sample-level masks)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """The whole blocks of all documents of each row, in order; rows with fewer than the most are filled up with
    blocks that no query may see."""

    tokens: Tensor
    """int64 [B, n * ratio]: places in the row of the blocks' tokens."""
    positions: Tensor
    """int64 [B, n]: place of each block's first token in its document."""
    starts: Tensor
    """bool [B, n]: the block is its document's first, so nothing precedes it."""
    mask: Tensor
    """bool [B, S, n]: token t may use block i, which is of its own document and complete at t."""

    def gather(self, rows: Tensor) -> Tensor:
        """rows [B, S, w] -> [B, n * ratio, w]: tokens that fill no block are left out."""
        return rows.gather(1, self.tokens.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


class PackedDocuments:
    """Rows whose tokens' places in their documents are ``positions`` int64 [B, S]: 0 starts a document, -1 is padding.

    A padding token is a document of its own that ``counted`` leaves out. Raises ValueError for positions that neither
    start a document nor go on with one.
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
        self._blocks: dict[int, Blocks] = {}

    def causal_mask(self) -> Tensor:
        """bool [B, S, S]: row i may see column j of its own document, j <= i."""
        place = torch.arange(self.positions.shape[1], device=self.positions.device)
        first = (place - self.positions).unsqueeze(-1)
        return (place <= place.unsqueeze(-1)) & (place >= first)

    def blocks(self, ratio: int) -> Blocks:
        """The documents cut into whole blocks of ``ratio`` >= 2 tokens, each document from its own first token; what
        is left over at a document's end belongs to no block."""
        if ratio not in self._blocks:
            self._blocks[ratio] = self._cut(ratio)
        return self._blocks[ratio]

    def _cut(self, ratio: int) -> Blocks:
        B, S = self.positions.shape
        device = self.positions.device
        ends = (self.positions + 1) % ratio == 0
        complete = ends.cumsum(dim=1)  # [B, S]: blocks of the row that are complete at each token
        n = int(complete[:, -1].max()) if S else 0
        rows, last = ends.nonzero(as_tuple=True)
        final = torch.full((B, n), min(ratio, S) - 1, device=device)
        final[rows, complete[rows, last] - 1] = last
        first = final - (ratio - 1)
        own = (self.positions + 1) // ratio  # blocks of the token's own document, complete at it
        block = torch.arange(n, device=device)
        mask = (block >= (complete - own).unsqueeze(-1)) & (block < complete.unsqueeze(-1))
        positions = self.positions.gather(1, first)
        tokens = (first.unsqueeze(-1) + torch.arange(ratio, device=device)).flatten(1)
        return Blocks(tokens, positions, positions == 0, mask)
