"""Learned pooling of a block of tokens to one cache entry (report 2.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kernels.autocast import cast, in_float32
from kernels.compress import compress
from kernels.linear import linear_concat
from model.forward.context import Context
from model.layers.linear import Linear
from model.layers.norm import RMSNorm
from model.layers.rope import Rotary, RotaryFrequencies

if TYPE_CHECKING:
    from model.cache.ring import CompressorState
    from model.config import ModelConfig


class Compressor(nn.Module):
    """Pools blocks of ``ratio`` tokens to entries of ``width`` dims: projection, gated pooling, norm, rotation.

    With ``overlap`` (csa) an entry pools the block before its own too. The rotation is at the position of the own
    block's first token. Everything runs in float32.
    """

    def __init__(self, config: ModelConfig, width: int, ratio: int, overlap: bool, rotary: Rotary):
        super().__init__()
        self.width, self.ratio, self.overlap = width, ratio, overlap
        rows = 2 * width if overlap else width
        self.wkv = Linear(config.hidden_size, rows, full_precision=True)
        self.wgate = Linear(config.hidden_size, rows, full_precision=True)
        self.ape = nn.Parameter(torch.zeros(ratio, rows))
        self.norm = RMSNorm(width, config.norm_eps)
        self.frequencies = RotaryFrequencies(rotary)

    def init_weights(self, std: float) -> None:
        self.ape.zero_()

    def split_sizes(self) -> dict[str, tuple[int, ...]]:
        """Return the rows of each projection in parameters that stack two: one for an entry's own block, and one for
        the entry after it."""
        return {f"{name}.weight": (self.width, self.width) for name in ("wkv", "wgate")} if self.overlap else {}

    def project(self, x: Tensor) -> Tensor:
        """Project x [B, S, hidden] to values beside gates, float32 [B, S, row width]."""
        with in_float32(x):
            return linear_concat(cast(x, torch.float32), (self.wkv.weight, self.wgate.weight))

    def pool(
        self, rows: Tensor, context: Context, state: CompressorState | None, stored: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Pool the blocks that the new tokens' rows [B, S, row width] complete: float32 [B, n, width].

        ``state`` holds the rows of unfinished blocks between calls; None pools whole sequences. ``stored`` rounds
        entries to their storage format.
        """
        if context.documents is not None:
            blocks = context.documents.blocks(self.ratio)
            rows, positions, starts = blocks.gather(rows), blocks.positions, blocks.starts
            return stored(self._pool(rows, positions, starts=starts))
        if state is not None:
            return self._pool_completed(rows, state, stored, context.batch_invariant)
        whole = rows.shape[1] // self.ratio * self.ratio
        positions = torch.arange(0, whole, self.ratio, device=rows.device).unsqueeze(0)
        return stored(self._pool(rows[:, :whole], positions))

    def _pool_completed(
        self, rows: Tensor, state: CompressorState, stored: Callable[[Tensor], Tensor], batch_invariant: bool
    ) -> Tensor:
        """Pool the blocks that new rows complete together with kept ones: [B, n, width]. Sequences that complete fewer
        than n have theirs first, padded with zeros."""
        m, new = self.ratio, rows.shape[1]
        pooled: list[tuple[list[int], Tensor]] = []
        for group in state.completions(new):
            own = rows if len(group.sequences) == len(rows) else rows[group.sequences]
            together = torch.cat((state.read_group(group), own), dim=1)
            whole = together.shape[1] // m * m
            count = whole // m - group.has_previous
            positions = (group.first_entry.unsqueeze(-1) + torch.arange(count, device=rows.device)) * m
            if whole < together.shape[1]:
                together = together[:, :whole]
            pool = self._pool_one_by_one if batch_invariant else self._pool_together
            pooled.append((group.sequences, pool(together, positions, group.has_previous, stored)))
        state.append(rows)
        if len(pooled) == 1 and len(pooled[0][0]) == len(rows):
            return pooled[0][1]
        n = max((entries.shape[1] for _, entries in pooled), default=0)
        padded = rows.new_zeros(len(rows), n, self.norm.weight.shape[0])
        for sequences, entries in pooled:
            padded[sequences, : entries.shape[1]] = entries
        return padded

    def _pool_together(
        self, rows: Tensor, positions: Tensor, has_previous: bool, stored: Callable[[Tensor], Tensor]
    ) -> Tensor:
        return stored(self._pool(rows, positions, has_previous))

    def _pool_one_by_one(
        self, rows: Tensor, positions: Tensor, has_previous: bool, stored: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Pool every entry in a call of one shape, except a sequence's first, which has no predecessor."""
        m = self.ratio
        sequences = []
        for row, places in zip(rows.split(1), positions.split(1)):
            entries = []
            for i, place in enumerate(places.split(1, dim=1)):
                end = (i + 1 + has_previous) * m
                preceded = self.overlap and end > m
                entries.append(stored(self._pool(row[:, end - (1 + preceded) * m : end], place, preceded)))
            sequences.append(torch.cat(entries, dim=1))
        return torch.cat(sequences)

    def _pool(
        self, rows: Tensor, positions: Tensor, has_previous: bool = False, starts: Tensor | None = None
    ) -> Tensor:
        """Pool rows [B, whole blocks of tokens, row width] to entries [B, n, width] at positions [B or 1, n]."""
        if positions.shape[1] == 0:
            return rows.new_zeros(rows.shape[0], 0, self.norm.weight.shape[0])
        entries = self.norm(compress(rows, self.ape, self.overlap, has_previous, starts))
        return self.frequencies.at(positions).apply(entries)
