"""Learned pooling of a block of tokens to one cache entry (report 2.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kernels.autocast import cast, in_float32
from kernels.cache_io import EntryLayout
from kernels.compress import DocumentBlocks, Finish, compress, compress_next
from kernels.linear import linear_concat
from model.forward.context import Context
from model.layers.linear import Linear
from model.layers.norm import RMSNorm
from model.layers.rope import Rotary, RotaryFrequencies, Rotation

if TYPE_CHECKING:
    from model.cache.entries import PagedEntries
    from model.cache.ring import CompressorState
    from model.config import ModelConfig


class Compressor(nn.Module):
    """Pools blocks of ``ratio`` tokens to entries of ``width`` dims: projection, gated pooling, norm, rotation.

    With ``overlap`` (csa) an entry pools the block before its own too. Entries are rotated by the position of the first
    token in their own block. With ``hadamard`` (index keys), a Hadamard rotation follows. Everything runs in float32.
    """

    def __init__(
        self, config: ModelConfig, width: int, ratio: int, overlap: bool, rotary: Rotary, hadamard: bool = False
    ):
        super().__init__()
        self.width, self.ratio, self.overlap, self.hadamard = width, ratio, overlap, hadamard
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

    def pool(self, rows: Tensor, context: Context, layout: EntryLayout | None) -> Tensor:
        """Pool the blocks of whole sequences with rows [B, S, row width]: float32 [B, n, width], rounded to ``layout``
        if there is one."""
        if context.documents is not None:
            blocks, positions, _ = context.documents.blocks(self.ratio)
            return self._pool(rows, positions, blocks=blocks, layout=layout)
        whole = rows.shape[1] // self.ratio * self.ratio
        positions = torch.arange(0, whole, self.ratio, device=rows.device).unsqueeze(0)
        return self._pool(rows[:, :whole], positions, layout=layout)

    def append(self, rows: Tensor, state: CompressorState, entries: PagedEntries, context: Context) -> None:
        """Pool the blocks that the new tokens' rows [B, S, row width] complete, together with those of unfinished
        blocks in ``state``, and append them to ``entries``."""
        if entries.table.may_complete(self.ratio):
            if context.batch_invariant:
                entries.append(self._pool_one_by_one(rows, state))
            else:
                lengths, new = state.table.starts, rows.shape[1]
                key = "rotation of new blocks", self.ratio, self.frequencies.rotary
                rotation = context.once(key, lambda: self._next_rotation(lengths, new))
                finish = Finish(self.norm.weight, self.norm.eps, *rotation, self.hadamard)
                compress_next(state.data, rows, self.ape, finish, lengths, self.overlap, entries.layout, entries.pages)
        state.append(rows)

    def _next_rotation(self, lengths: Tensor, new: int) -> Rotation:
        """Return the rotation of the blocks that ``new`` tokens after ``lengths`` tokens may complete."""
        blocks = (lengths // self.ratio).unsqueeze(-1) + torch.arange(-(-new // self.ratio), device=lengths.device)
        return self.frequencies.at(blocks * self.ratio)

    def _pool_one_by_one(self, rows: Tensor, state: CompressorState) -> Tensor:
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
                entries.append(self._pool(together[:, end - m - before : end], place, before > 0)[0])
            sequences.append(torch.cat(entries))
        return pad_sequence(sequences, batch_first=True)

    def _pool(
        self,
        rows: Tensor,
        positions: Tensor,
        has_previous: bool = False,
        blocks: DocumentBlocks | None = None,
        layout: EntryLayout | None = None,
    ) -> Tensor:
        """Pool rows [B, tokens, row width] to entries [B, n, width] at positions [B or 1, n]."""
        if positions.shape[1] == 0:
            return rows.new_zeros(rows.shape[0], 0, self.width)
        return compress(rows, self.ape, self._finish(positions), self.overlap, has_previous, blocks, layout)

    def _finish(self, positions: Tensor) -> Finish:
        """Return the steps after the pooling for entries at positions [B or 1, n]."""
        return Finish(self.norm.weight, self.norm.eps, *self.frequencies.at(positions), self.hadamard)
