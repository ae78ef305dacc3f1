"""The learned pooling that turns a run of tokens into one cache entry."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.compress import compress
from model.cache_parts import Tail
from model.config import ModelConfig
from model.mixers.base import Context
from model.norm import RMSNorm
from model.precision import in_float32
from model.rope import RotaryFrequencies


class Compressor(nn.Module):
    """Pools blocks of ``ratio`` tokens to entries of ``width`` dims: projection, gated pooling, norm, rotation.

    With ``overlap`` an entry also sees the block before its own (csa); without, only its own (hca). The rotation is
    at the position of the own block's first token. Everything runs in float32.
    """

    def __init__(self, config: ModelConfig, width: int, ratio: int, overlap: bool):
        super().__init__()
        self.ratio, self.overlap = ratio, overlap
        rows = 2 * width if overlap else width
        self.wkv = nn.Linear(config.hidden_size, rows, bias=False)
        self.wgate = nn.Linear(config.hidden_size, rows, bias=False)
        self.ape = nn.Parameter(torch.zeros(ratio, rows))
        self.norm = RMSNorm(width, config.norm_eps)
        self.frequencies = RotaryFrequencies(config.rope_head_dim, config.compress_rope_theta, config)

    def forward(self, x: Tensor, context: Context, tail: Tail | None = None) -> Tensor:
        """Entries of the blocks that x [B, S, hidden] completes: float32 [B, n, width].

        ``tail`` holds the projected rows that earlier calls left over and takes those that this one leaves.
        """
        with in_float32(x):
            x = x.float()
            rows = torch.cat((self.wkv(x), self.wgate(x)), dim=-1)
        if context.documents is not None:
            blocks = context.documents.blocks(self.ratio)
            rows, positions, starts = blocks.gather(rows), blocks.positions, blocks.starts
            return self._pool(rows, positions, starts=starts)
        if tail is not None:
            return self._go_on(rows, tail)
        whole = rows.shape[1] // self.ratio * self.ratio
        positions = torch.arange(0, whole, self.ratio, device=x.device).unsqueeze(0)
        return self._pool(rows[:, :whole], positions)

    def _go_on(self, rows: Tensor, tail: Tail) -> Tensor:
        """Entries [B, n, width] of the blocks that new rows complete together with kept ones; sequences that complete
        fewer than n have them first."""
        m, new = self.ratio, rows.shape[1]
        made: list[tuple[list[int], Tensor]] = []
        for group in tail.completions(new):
            together = torch.cat((tail.read(group), rows[group.sequences]), dim=1)
            whole = together.shape[1] // m * m
            count = whole // m - group.has_previous
            positions = (group.first_entry.unsqueeze(-1) + torch.arange(count, device=rows.device)) * m
            made.append((group.sequences, self._pool(together[:, :whole], positions, group.has_previous)))
        tail.append(rows)
        if len(made) == 1 and len(made[0][0]) == len(rows):
            return made[0][1]
        most = max((entries.shape[1] for _, entries in made), default=0)
        padded = rows.new_zeros(len(rows), most, self.norm.weight.shape[0])
        for sequences, entries in made:
            padded[sequences, : entries.shape[1]] = entries
        return padded

    def _pool(
        self, rows: Tensor, positions: Tensor, has_previous: bool = False, starts: Tensor | None = None
    ) -> Tensor:
        """rows [B, whole blocks of tokens, 2 * width] and the new entries' positions [B or 1, n] -> [B, n, width]."""
        if positions.shape[1] == 0:
            return rows.new_zeros(rows.shape[0], 0, self.norm.weight.shape[0])
        values, gates = rows.chunk(2, dim=-1)
        entries = self.norm(compress(values, gates, self.ape, self.overlap, has_previous, starts))
        return self.frequencies.at(positions).apply(entries)
