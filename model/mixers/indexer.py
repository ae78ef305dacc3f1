"""The lightning indexer: small separate heads that score entries for a query (report eq. 13-17)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from kernels.entry_ranges import EntryRanges
from kernels.index_topk import index_topk, select_entries
from kernels.projection import index_query
from kernels.sparse_attention import EntryMass
from model.forward.aux_outputs import AuxOutputs
from model.forward.context import Context
from model.layers.linear import Linear
from model.layers.rope import Rotary, Rotation
from model.mixers.base import Mixer, StoredFormat, require
from model.mixers.compressor import Compressor
from model.precision import Precision

if TYPE_CHECKING:
    from model.cache.entries import PagedEntries
    from model.config import ModelConfig


_MEASURED_QUERIES = 1024
"""Queries whose selection is measured together."""


def check_index_dims(config: ModelConfig, rope_field: str, rope_dims: int) -> None:
    """Raise ConfigError unless ``index_head_dim`` is a power of two and at least ``rope_dims``, which ``rope_field``
    sets."""
    width = config.index_head_dim
    require(
        width & (width - 1) == 0,
        f"must be a power of two for the Hadamard rotation, found {width}",
        "index_head_dim",
    )
    require(rope_dims <= width, f"{rope_dims} is wider than index_head_dim {width}", rope_field)


def index_format(config: ModelConfig) -> StoredFormat:
    """Return the format of index queries and keys, one tensor each."""
    return StoredFormat("index queries and keys (after Hadamard)", config.index_format, 2)


class LightningIndexer(nn.Module):
    """Scores entries for a query. Its queries share the attention's latent."""

    def __init__(self, config: ModelConfig, rotary: Rotary):
        super().__init__()
        self.heads, self.head_dim = config.index_heads, config.index_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.head_dim)
        self.weights_proj = Linear(config.hidden_size, self.heads, full_precision=True)
        self.compressor = Compressor(config, self.head_dim, config.csa_ratio, True, rotary, hadamard=True)

    def queries(self, x: Tensor, latent: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Return rotated queries [B, S, heads, head_dim] and scaled head weights [B, S, heads]."""
        query = index_query(latent, self.wq_b.weight, *rotation, self.heads)
        return query, self.weights_proj(x) * (self.head_dim * self.heads) ** -0.5


class IndexInputs(NamedTuple):
    """Inputs of an indexer's scores."""

    query: Tensor
    """float32 [B, S, index_heads, index_head_dim]"""
    keys: Tensor
    """float32 [B, T, index_head_dim], as stored."""
    weights: Tensor
    """float32 [B, S, index_heads]"""

    def select(self, visible: EntryRanges, config: ModelConfig) -> Tensor:
        """Return the ``index_topk`` visible entries with the best scores, int64 [B, S, K], -1 in unused slots."""
        return select_entries(*self, visible, config.index_topk, Precision(config).score_dtype)


def select_stored(
    mixer: Mixer, query: Tensor, weights: Tensor, keys: PagedEntries, visible: Tensor, context: Context
) -> Tensor:
    """Return the ``index_topk`` stored entries with the best scores, int64 [B, S, K], -1 in unused slots.

    ``query`` and ``weights`` are those of :class:`IndexInputs`; ``visible`` is the number of entries that each query
    sees, int64 [B or 1, S].
    """
    if mixer.training:  # stored keys are always rounded, so the queries must be, too
        query = mixer.precision.round_index(query, training=False)
    return index_topk(
        query,
        keys.pages,
        keys.layout,
        weights,
        visible,
        mixer.config.index_topk,
        mixer.precision.score_dtype,
        context.batch_invariant,
    )


@torch.no_grad()
def measure_selection(
    aux: AuxOutputs, layer: int, teacher: EntryMass, index: IndexInputs, visible: EntryRanges, config: ModelConfig
) -> None:
    """Measure the share of dense attention mass on selected entries, over queries that see more than k entries.

    ``teacher`` is the mass of the visible entries. Memory does not grow with S * T if the teacher's does not.
    """
    (B, S), k = index.query.shape[:2], config.index_topk
    crowded = (visible.end - visible.first > k).expand(B, S)
    if not crowded.any():
        return
    chosen = index.select(visible, config)
    of_all = of_best = torch.zeros((), device=chosen.device)
    for begin in range(0, S, _MEASURED_QUERIES):
        queries = slice(begin, begin + _MEASURED_QUERIES)
        counted = crowded[:, queries]
        mass, selected = teacher.of(queries)[counted], chosen[:, queries][counted]
        if len(mass):
            held = mass.gather(-1, selected.clamp(min=0)).masked_fill(selected < 0, 0.0).sum(-1)
            of_all = of_all + (held / mass.sum(-1)).sum()
            of_best = of_best + (held / mass.topk(k, dim=-1).values.sum(-1)).sum()
    count = crowded.sum()
    aux.metrics["recall_at_k"][layer] = of_all / count
    aux.metrics["recall_at_k_of_best"][layer] = of_best / count
