"""What csa and hca layers have in common: the sliding window beside a history of compressed entries."""

from __future__ import annotations

import torch
from torch import Tensor

from model.cache_parts import Tail
from model.config import ModelConfig
from model.mixers.base import Context
from model.mixers.compressor import Compressor
from model.mixers.sliding import SlidingWindowAttention
from model.rope import Rotation


class CompressedAttention(SlidingWindowAttention):
    """Subclasses say whether blocks ``overlap`` and which entries a query attends to."""

    overlap: bool

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.ratio = config.compress_ratio(self.name)
        self.compressor = Compressor(config, config.head_dim, self.ratio, self.overlap)

    def project_history(self, x: Tensor, latent: Tensor, rotation: Rotation) -> dict[str, Tensor]:
        return {"rows": self.compressor.project(x)}

    def pool(self, projected: dict[str, Tensor], context: Context, tail: Tail | None) -> Tensor:
        """The entries that the new tokens complete, as stored: [B, n, head_dim]."""
        return self.compressor.pool(
            projected["rows"], context, tail, lambda x: self.precision.round_main(x, self.training)
        )


def visible_entries(context: Context, ratio: int) -> Tensor:
    """How many entries, the first ones, each query may use: int64 [B or 1, S].

    Token t (from 0) sees entry s iff s < (t + 1) // ratio: a block becomes visible to its own last token. The report's
    text can be read one token later; the released code, and so the released weights, do this.
    """
    return (context.positions + 1) // ratio


def entry_mask(context: Context, ratio: int, entries: Tensor) -> Tensor:
    """Which of ``entries`` [B, T, c], pooled from ``ratio`` tokens each, the queries may use: bool [B or 1, S, T]."""
    if context.documents is not None:
        return context.documents.blocks(ratio).mask
    return torch.arange(entries.shape[1], device=entries.device) < visible_entries(context, ratio).unsqueeze(-1)
