"""The learned pooling that turns a run of tokens into one cache entry."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.compress import compress
from model.cache import TailState
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

    def forward(self, x: Tensor, context: Context, tail: TailState | None = None) -> Tensor:
        """Entries of the blocks that x [B, S, hidden] completes: float32 [B, n, width].

        ``tail`` holds the projected rows that earlier calls left over and takes those that this one leaves.
        """
        m, start = self.ratio, context.start
        with in_float32(x):
            x = x.float()
            rows = torch.cat((self.wkv(x), self.wgate(x)), dim=-1)
        if context.documents is not None:
            blocks = context.documents.blocks(m)
            rows, positions, starts = blocks.gather(rows), blocks.positions, blocks.starts
            return self._pool(rows, positions, starts=starts)
        has_previous = False
        if tail is not None:
            rows = torch.cat((tail.read(), rows), dim=1)
            has_previous = self.overlap and start >= m
            end = start + x.shape[1]
            tail.write(rows, keep=end % m + (m if self.overlap and end >= m else 0))
        whole = rows.shape[1] // m * m
        first = start // m
        positions = torch.arange(first, first + whole // m - has_previous, device=x.device).unsqueeze(0) * m
        return self._pool(rows[:, :whole], positions, has_previous)

    def _pool(
        self, rows: Tensor, positions: Tensor, has_previous: bool = False, starts: Tensor | None = None
    ) -> Tensor:
        """rows [B, whole blocks of tokens, 2 * width] and the new entries' positions [B or 1, n] -> [B, n, width]."""
        if positions.shape[1] == 0:
            return rows.new_zeros(rows.shape[0], 0, self.norm.weight.shape[0])
        values, gates = rows.chunk(2, dim=-1)
        entries = self.norm(compress(values, gates, self.ape, self.overlap, has_previous, starts))
        return self.frequencies.at(positions).apply(entries)
