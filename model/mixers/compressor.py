"""The learned pooling that turns a run of tokens into one cache entry."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels.autocast import cast, in_float32
from kernels.compress import compress
from kernels.linear import linear_concat
from model.cache_parts import Tail
from model.config import ModelConfig
from model.linear import Linear
from model.mixers.base import Context
from model.norm import RMSNorm
from model.rope import RotaryFrequencies


class Compressor(nn.Module):
    """Pools blocks of ``ratio`` tokens to entries of ``width`` dims: projection, gated pooling, norm, rotation.

    With ``overlap`` an entry also sees the block before its own (csa); without, only its own (hca). The rotation is
    at the position of the own block's first token. Everything runs in float32.
    """

    def __init__(self, config: ModelConfig, width: int, ratio: int, overlap: bool):
        super().__init__()
        self.width, self.ratio, self.overlap = width, ratio, overlap
        rows = 2 * width if overlap else width
        self.wkv = Linear(config.hidden_size, rows)
        self.wgate = Linear(config.hidden_size, rows)
        self.ape = nn.Parameter(torch.zeros(ratio, rows))
        self.norm = RMSNorm(width, config.norm_eps)
        self.frequencies = RotaryFrequencies(config.rope_head_dim, config.compress_rope_theta, config)

    def project(self, x: Tensor) -> Tensor:
        """x [B, S, hidden] to the rows that are pooled, values beside gates: float32 [B, S, rows of a Tail]."""
        with in_float32(x):
            return linear_concat(cast(x, torch.float32), (self.wkv.weight, self.wgate.weight))

    def pool(self, rows: Tensor, context: Context, tail: Tail | None, stored: Callable[[Tensor], Tensor]) -> Tensor:
        """Entries of the blocks that the new tokens' rows [B, S, ...] complete: float32 [B, n, width].

        ``tail`` holds the rows that earlier calls left over and takes those that this one leaves. ``stored`` rounds
        entries as they are kept.
        """
        if context.documents is not None:
            blocks = context.documents.blocks(self.ratio)
            rows, positions, starts = blocks.gather(rows), blocks.positions, blocks.starts
            return stored(self._pool(rows, positions, starts=starts))
        if tail is not None:
            return self._go_on(rows, tail, stored, context.execution.batch_invariant)
        whole = rows.shape[1] // self.ratio * self.ratio
        positions = torch.arange(0, whole, self.ratio, device=rows.device).unsqueeze(0)
        return stored(self._pool(rows[:, :whole], positions))

    def _go_on(self, rows: Tensor, tail: Tail, stored: Callable[[Tensor], Tensor], batch_invariant: bool) -> Tensor:
        """Entries [B, n, width] of the blocks that new rows complete together with kept ones; sequences that complete
        fewer than n have them first."""
        m, new = self.ratio, rows.shape[1]
        made: list[tuple[list[int], Tensor]] = []
        for group in tail.completions(new):
            own = rows if len(group.sequences) == len(rows) else rows[group.sequences]
            together = torch.cat((tail.read(group), own), dim=1)
            whole = together.shape[1] // m * m
            count = whole // m - group.has_previous
            positions = (group.first_entry.unsqueeze(-1) + torch.arange(count, device=rows.device)) * m
            if whole < together.shape[1]:
                together = together[:, :whole]
            pool = self._pool_one_by_one if batch_invariant else self._pool_together
            made.append((group.sequences, pool(together, positions, group.has_previous, stored)))
        tail.append(rows)
        if len(made) == 1 and len(made[0][0]) == len(rows):
            return made[0][1]
        most = max((entries.shape[1] for _, entries in made), default=0)
        padded = rows.new_zeros(len(rows), most, self.norm.weight.shape[0])
        for sequences, entries in made:
            padded[sequences, : entries.shape[1]] = entries
        return padded

    def _pool_together(
        self, rows: Tensor, positions: Tensor, has_previous: bool, stored: Callable[[Tensor], Tensor]
    ) -> Tensor:
        return stored(self._pool(rows, positions, has_previous))

    def _pool_one_by_one(
        self, rows: Tensor, positions: Tensor, has_previous: bool, stored: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The same, every entry in a call of the same shape (but a sequence's first, which has no predecessor)."""
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
        """rows [B, whole blocks of tokens, 2 * width] and the new entries' positions [B or 1, n] -> [B, n, width]."""
        if positions.shape[1] == 0:
            return rows.new_zeros(rows.shape[0], 0, self.norm.weight.shape[0])
        entries = self.norm(compress(rows, self.ape, self.overlap, has_previous, starts))
        return self.frequencies.at(positions).apply(entries)
