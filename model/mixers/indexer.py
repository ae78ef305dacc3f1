"""The lightning indexer: small heads of its own that score entries for a query (report eq. 13-17)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kernels.projection import index_query
from model.layers.linear import Linear
from model.layers.rope import Rotary, Rotation
from model.mixers.compressor import Compressor

if TYPE_CHECKING:
    from model.config import ModelConfig


class LightningIndexer(nn.Module):
    """Scores entries for a query. Its queries share the attention's latent."""

    def __init__(self, config: ModelConfig, rotary: Rotary):
        super().__init__()
        self.heads, self.head_dim = config.index_heads, config.index_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.head_dim)
        self.weights_proj = Linear(config.hidden_size, self.heads, full_precision=True)
        self.compressor = Compressor(config, self.head_dim, config.csa_ratio, True, rotary)

    def queries(self, x: Tensor, latent: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Return rotated queries [B, S, heads, head_dim] and scaled head weights [B, S, heads]."""
        query = index_query(latent, self.wq_b.weight, *rotation, self.heads)
        return query, self.weights_proj(x) * (self.head_dim * self.heads) ** -0.5


def indexer_kl(teacher: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher || softmax(scores)) over the permitted entries, averaged over queries that have any.

    teacher [B, S, T] is the attention probability of each entry in the softmax over entries, window and sink, summed
    over heads. It is normalized here over the permitted entries (V3.2's rule, adapted to the joint softmax). scores [B,
    S, T] carry the gradient; mask bool [B or 1, S, T].
    """
    has_any = mask.any(-1)
    target = teacher / teacher.sum(-1, keepdim=True).clamp(min=1e-20)
    log_choice = scores.masked_fill(~mask, float("-inf")).log_softmax(-1).masked_fill(~mask, 0.0)
    divergence = (torch.xlogy(target, target) - target * log_choice).sum(-1)
    counted = has_any.expand_as(divergence)
    return divergence.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
