"""Compressed Sparse Attention: fine entries, of which an indexer selects a few for every query (report 2.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.autocast import detached
from kernels.indexer_kl import indexer_kl
from kernels.paged_attention import EntrySet
from model.cache.parts import CachePart, CompressorPart, GrowingPart
from model.forward.context import Context
from model.layers.rope import Rotation
from model.mixers.base import StoredFormat
from model.mixers.compressed import CompressedAttention, entry_ranges, visible_entries
from model.mixers.indexer import (
    IndexInputs,
    LightningIndexer,
    check_index_dims,
    index_format,
    measure_selection,
    select_stored,
)
from model.mixers.sliding import History, Projected
from model.precision import index_layout
from model.work import Work, product_format

if TYPE_CHECKING:
    from model.cache.layer_cache import LayerCache
    from model.config import ModelConfig


class CompressedSparseAttention(CompressedAttention):
    """Attention to the sliding window and to the entries of overlapping blocks that an indexer selects."""

    name = "csa"
    ratio_field = "csa_ratio"
    formats = (*CompressedAttention.formats, "index_format")
    overlap = True
    batch_invariant_widths = (*CompressedAttention.batch_invariant_widths, "index_head_dim")

    # --- declarations

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        super().check(config)
        check_index_dims(config, "rope_head_dim", config.rope_head_dim)

    @classmethod
    def indexer_ratio(cls, config: ModelConfig) -> int:
        return config.csa_ratio

    @classmethod
    def cache_parts(cls, config: ModelConfig) -> dict[str, CachePart]:
        return {
            **super().cache_parts(config),
            "index": GrowingPart(index_layout(config), config.csa_ratio, "index"),
            "index_tail": CompressorPart(config.csa_ratio, config.index_head_dim, cls.overlap),
        }

    @classmethod
    def stored_formats(cls, config: ModelConfig) -> list[StoredFormat]:
        return [*super().stored_formats(config), index_format(config)]

    @classmethod
    def attended_entries(cls, config: ModelConfig, tokens: int) -> int:
        return min(config.index_topk, tokens // config.csa_ratio)

    @classmethod
    def work(cls, config: ModelConfig, tokens: int) -> list[Work]:
        c = config
        heads = c.index_heads * c.index_head_dim
        keys = c.hidden_size * (2 * 2 * c.index_head_dim + c.index_heads)
        return [
            *super().work(c, tokens),
            Work("index queries", "linear", "fp8", 2.0 * c.q_lora_rank * heads),
            Work("index keys and head weights", "linear", "bf16", 2.0 * keys),
            Work("index scores", "index", product_format(c.index_format), 2.0 * heads * (tokens // c.csa_ratio)),
        ]

    # --- the layer

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.indexer = LightningIndexer(config, self.rotary(config))

    def project_history(self, x: Tensor, latent: Tensor, rotation: Rotation, context: Context) -> History:
        # The indexer learns from its own loss only and the network from the language-model loss only: the indexer's
        # inputs are detached here, and its selection is an integer.
        detached_x = detached(x)
        query, weights = self.indexer.queries(detached_x, detached(latent), rotation)
        return History(
            rows=self.compressor.project(x),
            index_query=self.precision.round_index(query, self.training, context.aux),
            index_weights=weights,
            index_rows=self.indexer.compressor.project(detached_x),
        )

    def append(self, history: History, context: Context, cache: LayerCache) -> None:
        super().append(history, context, cache)
        assert history.index_rows is not None
        self.indexer.compressor.append(history.index_rows, cache.index_tail, cache.index, context)

    def attend(self, projected: Projected, context: Context) -> Tensor:
        history = projected.history
        entries = self.pool(history, context)
        assert history.index_rows is not None
        layout = self.precision.index_rounding(self.training, context.aux)
        keys = self.indexer.compressor.pool(history.index_rows, context, layout)
        assert history.index_query is not None and history.index_weights is not None
        index = IndexInputs(history.index_query, keys, history.index_weights)
        visible = entry_ranges(context, self.ratio)
        chosen = None if context.attention == "dense" else index.select(visible, self.config)
        out, mass = self.core_attention(projected, entries, visible, context, chosen)
        aux = context.aux
        if aux is not None and mass is not None:
            aux.losses["indexer_kl"][self.layer] = indexer_kl(*index, mass, visible, chosen)
            if aux.measure_selection:
                with torch.no_grad():
                    _, teacher = self.core_attention(projected, entries, visible, context)
                assert teacher is not None
                measure_selection(aux, self.layer, teacher, index, visible, self.config)
        return out

    def select(self, history: History, context: Context, cache: LayerCache) -> EntrySet:
        self.append(history, context, cache)
        query, weights = history.index_query, history.index_weights
        assert query is not None and weights is not None
        chosen = select_stored(self, query, weights, cache.index, visible_entries(context, self.ratio), context)
        return EntrySet(cache.entries.pages, chosen=chosen)

    def split_sizes(self) -> dict[str, tuple[int, ...]]:
        indexer = self.indexer.compressor.split_sizes()
        return {**super().split_sizes(), **{f"indexer.compressor.{name}": rows for name, rows in indexer.items()}}
