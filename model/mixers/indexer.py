"""The lightning indexer: small heads of its own that score entries for a query (report eq. 13-17)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kernels.index_topk import select_topk
from kernels.projection import index_query
from model.forward.aux_outputs import AuxOutputs
from model.layers.linear import Linear
from model.layers.rope import Rotary, Rotation
from model.mixers.compressor import Compressor
from model.precision import Precision

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


def selection_mask(scores: Tensor, visible: Tensor, config: ModelConfig) -> Tensor:
    """Return the ``index_topk`` visible entries with the best scores [B, S, T] as a mask, bool [B, S, T]."""
    return as_mask(select_topk(scores.to(Precision(config).score_dtype), visible, config.index_topk), scores.shape[-1])


def as_mask(chosen: Tensor, entries: int) -> Tensor:
    """Return the chosen indices int64 [B, S, K], -1 in unused slots, as a mask: bool [B, S, entries]."""
    mask = torch.zeros(*chosen.shape[:2], entries + 1, dtype=torch.bool, device=chosen.device)
    # Unused slots (-1) wrap around to the extra last column, which is cut off.
    return mask.scatter_(-1, chosen % mask.shape[-1], True)[..., :-1]


def measure_selection(
    aux: AuxOutputs, layer: int, teacher: Tensor, scores: Tensor, visible: Tensor, config: ModelConfig
) -> None:
    """Measure the share of dense attention mass on selected entries, over queries that see more than k entries.

    ``teacher`` is the mass of the visible entries and ``scores`` are their index scores, float32 [B, S, T]. ``visible``
    is bool [B or 1, S, T].
    """
    k = config.index_topk
    crowded = (visible.sum(-1) > k).expand(scores.shape[:2])
    if not crowded.any():
        return
    held = (teacher * selection_mask(scores, visible, config))[crowded].sum(-1)
    best = teacher[crowded].topk(k, dim=-1).values.sum(-1)
    total = teacher[crowded].sum(-1)
    aux.metrics["recall_at_k"][layer] = (held / total).mean()
    aux.metrics["recall_at_k_of_best"][layer] = (held / best).mean()


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
