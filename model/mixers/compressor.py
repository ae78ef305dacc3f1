"""Learned pooling of a block of tokens to one cache entry (report 2.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kernels.autocast import cast, in_float32
from kernels.compress import compress, compress_next
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
        """Project x [B, S, hidden] to values and gates, concatenated: float32 [B, S, row width]."""
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
        if state is not None and context.batch_invariant:
            return self._pool_one_by_one(rows, state, stored)
        if state is not None:
            return self._pool_completed(rows, state, stored)
        whole = rows.shape[1] // self.ratio * self.ratio
        positions = torch.arange(0, whole, self.ratio, device=rows.device).unsqueeze(0)
        return stored(self._pool(rows[:, :whole], positions))

    def _pool_completed(self, rows: Tensor, state: CompressorState, stored: Callable[[Tensor], Tensor]) -> Tensor:
        """Pool the blocks that new rows complete together with kept ones: [B, n, width]. Sequences that complete fewer
        than n have theirs first, followed by arbitrary values."""
        entries = compress_next(state.data, rows, self.ape, state.table.lengths, self.overlap)
        n = entries.shape[1]
        if n:
            first = (state.table.starts // self.ratio).unsqueeze(-1)
            entries = stored(self._finish(entries, (first + torch.arange(n, device=rows.device)) * self.ratio))
        state.append(rows)
        return entries

    def _pool_one_by_one(self, rows: Tensor, state: CompressorState, stored: Callable[[Tensor], Tensor]) -> Tensor:
        """Pool the blocks that new rows complete, in batch-invariant mode: [B, n, width]. All calls have the same
        shape, except that of a sequence's first entry, which has no preceding block."""
        m, new = self.ratio, rows.shape[1]
        sequences: list[Tensor] = []
        for sequence, length in enumerate(state.table.lengths):
            if (length + new) // m == length // m:
                sequences.append(rows.new_zeros(0, self.width))
                continue
            preceded = self.overlap and length >= m
            past = state.read(length % m + m * preceded, [sequence])[0]
            together = torch.cat((past, rows[sequence])).unsqueeze(0)
            entries = []
            for block in range(length // m, (length + new) // m):
                end = (block + 1) * m - length + len(past)
                place = torch.tensor([[block * m]], device=rows.device)
                before = m * (self.overlap and block > 0)
                entries.append(stored(self._pool(together[:, end - m - before : end], place, before > 0))[0])
            sequences.append(torch.cat(entries))
        state.append(rows)
        return pad_sequence(sequences, batch_first=True)

    def _pool(
        self, rows: Tensor, positions: Tensor, has_previous: bool = False, starts: Tensor | None = None
    ) -> Tensor:
        """Pool rows [B, whole blocks of tokens, row width] to entries [B, n, width] at positions [B or 1, n]."""
        if positions.shape[1] == 0:
            return rows.new_zeros(rows.shape[0], 0, self.norm.weight.shape[0])
        return self._finish(compress(rows, self.ape, self.overlap, has_previous, starts), positions)

    def _finish(self, pooled: Tensor, positions: Tensor) -> Tensor:
        """Normalize and rotate pooled entries [B, n, width] at positions [B or 1, n]."""
        return self.frequencies.at(positions).apply(self.norm(pooled))
