"""The learned pooling that turns a run of tokens into one cache entry."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.compress import compress
from model.cache import TailState
from model.config import ModelConfig
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

    def forward(self, x: Tensor, start: int, tail: TailState | None = None) -> Tensor:
        """Entries of the blocks that x [B, S, hidden], at positions ``start ..``, completes: float32 [B, n, width].

        ``tail`` holds the projected rows that earlier calls left over and takes those that this one leaves.
        """
        m = self.ratio
        with in_float32(x):
            x = x.float()
            rows = torch.cat((self.wkv(x), self.wgate(x)), dim=-1)
        has_previous = False
        if tail is not None:
            rows = torch.cat((tail.read(), rows), dim=1)
            has_previous = self.overlap and start >= m
            end = start + x.shape[1]
            tail.write(rows, keep=end % m + (m if self.overlap and end >= m else 0))
        whole = rows.shape[1] // m * m
        blocks = whole // m - has_previous
        if blocks == 0:
            return rows.new_zeros(x.shape[0], 0, self.norm.weight.shape[0])
        values, gates = rows[:, :whole].chunk(2, dim=-1)
        entries = self.norm(compress(values, gates, self.ape, self.overlap, has_previous))
        first = start // m
        positions = torch.arange(first, first + blocks, device=x.device) * m
        return self.frequencies.at(positions).apply(entries)
