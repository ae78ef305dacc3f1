"""Compressed Sparse Attention: fine entries, of which a lightning indexer picks the few to attend to (report 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.autocast import detached
from kernels.hadamard import hadamard
from kernels.index_scores import index_scores
from kernels.index_topk import index_topk, select_topk
from kernels.paged_attention import EntrySet
from kernels.projection import index_query
from model.cache_parts import LayerCache, Tail
from model.config import ModelConfig
from model.linear import Linear
from model.mixers.base import Context
from model.mixers.compressed import CompressedAttention, entry_mask, visible_entries
from model.mixers.compressor import Compressor
from model.rope import Rotation
from model.telemetry import Telemetry


class LightningIndexer(nn.Module):
    """Scores entries for a query with small heads of its own (report eq. 13-17). Queries share the latent."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.head_dim = config.index_heads, config.index_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.head_dim)
        self.weights_proj = Linear(config.hidden_size, self.heads)
        self.compressor = Compressor(config, self.head_dim, config.csa_ratio, overlap=True)

    def queries(self, x: Tensor, latent: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Rotated queries [B, S, heads, head_dim] and scaled head weights [B, S, heads]."""
        query = index_query(latent, self.wq_b.weight, *rotation, self.heads)
        return query, self.weights_proj(x) * (self.head_dim * self.heads) ** -0.5


class CompressedSparseAttention(CompressedAttention):
    name = "csa"
    overlap = True

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.indexer = LightningIndexer(config)

    def project_history(self, x: Tensor, latent: Tensor, rotation: Rotation) -> dict[str, Tensor]:
        # The indexer learns from its own loss only, and the network from the language-model loss only: its inputs are
        # detached here, and its choice is an integer.
        detached_x = detached(x)
        query, head_weights = self.indexer.queries(detached_x, detached(latent), rotation)
        return {
            **super().project_history(x, latent, rotation),
            "index_query": self.precision.round_index(query, self.training),
            "head_weights": head_weights,
            "index_rows": self.indexer.compressor.project(detached_x),
        }

    def pool_index(self, projected: dict[str, Tensor], context: Context, tail: Tail | None) -> Tensor:
        """The index keys that the new tokens complete, as stored: [B, n, index_head_dim]."""
        return self.indexer.compressor.pool(
            projected["index_rows"], context, tail, lambda x: self.precision.round_index(hadamard(x), self.training)
        )

    def attend(self, projected: dict[str, Tensor], context: Context) -> Tensor:
        entries = self.pool(projected, context, None)
        keys = self.pool_index(projected, context, None)
        may_see = entry_mask(context, self.ratio, entries)
        scores = index_scores(projected["index_query"], keys, projected["head_weights"], may_see)
        mask = may_see if context.attention == "dense" else self._selected(scores, may_see)
        out, mass = self.core_attention(projected, entries, mask, context)
        telemetry = context.telemetry
        if telemetry is not None and mass is not None:
            telemetry.losses["indexer_kl"][self.layer] = indexer_kl(mass, scores, mask)
            if telemetry.measure_selection:
                _, teacher = self.core_attention(projected, entries, may_see, context)
                assert teacher is not None
                self._measure_selection(telemetry, teacher, scores, may_see)
        return out

    def _selected(self, scores: Tensor, may_see: Tensor) -> Tensor:
        """The indexer's choice as a mask, bool [B, S, T]."""
        chosen = select_topk(scores.to(self.precision.score_dtype), may_see, self.config.index_topk)
        mask = torch.zeros(*scores.shape[:2], scores.shape[-1] + 1, dtype=torch.bool, device=scores.device)
        # Unused places (-1) wrap around to the extra last column, which is cut off.
        return mask.scatter_(-1, chosen % mask.shape[-1], True)[..., :-1]

    def select(self, projected: dict[str, Tensor], context: Context, cache: LayerCache) -> EntrySet:
        cache.entries.append(self.pool(projected, context, cache.tail))
        cache.index.append(self.pool_index(projected, context, cache.index_tail))
        return self.choose(projected, context, cache)

    def choose(self, projected: dict[str, Tensor], context: Context, cache: LayerCache) -> EntrySet:
        """The indexer's choice for every token, from the keys in the cache."""
        query = projected["index_query"]
        if self.training:  # keys are read as stored, so the queries are rounded, too, whatever training does
            query = self.precision.round_index(query, training=False)
        chosen = index_topk(
            query,
            cache.index.pages,
            cache.index.layout,
            projected["head_weights"],
            visible_entries(context, self.ratio),
            self.config.index_topk,
            self.precision.score_dtype,
            context.execution.batch_invariant,
        )
        return EntrySet(cache.entries.pages, chosen=chosen)

    def _measure_selection(self, telemetry: Telemetry, teacher: Tensor, scores: Tensor, may_see: Tensor) -> None:
        """Share of the dense attention mass that the indexer's choice holds, over queries with a real choice."""
        k = self.config.index_topk
        crowded = (may_see.sum(-1) > k).expand(scores.shape[:2])
        if not crowded.any():
            return
        held = (teacher * self._selected(scores, may_see))[crowded].sum(-1)
        best = teacher[crowded].topk(k, dim=-1).values.sum(-1)
        total = teacher[crowded].sum(-1)
        telemetry.measures["recall_at_k"][self.layer] = (held / total).mean()
        telemetry.measures["recall_at_k_of_best"][self.layer] = (held / best).mean()


def indexer_kl(teacher: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher || softmax(scores)) over the permitted entries, averaged over queries that have any.

    teacher [B, S, T]: attention mass on entries out of the joint softmax with window and sink, summed over heads; it
    is normalised here to the permitted entries (V3.2's rule, adapted to the joint softmax). scores [B, S, T] carry the
    gradient; mask bool [B or 1, S, T].
    """
    has_any = mask.any(-1)
    target = teacher / teacher.sum(-1, keepdim=True).clamp(min=1e-20)
    log_choice = scores.masked_fill(~mask, float("-inf")).log_softmax(-1).masked_fill(~mask, 0.0)
    divergence = (torch.xlogy(target, target) - target * log_choice).sum(-1)
    counted = has_any.expand_as(divergence)
    return divergence.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
