"""Attention to the sliding window and to compressed entries: the common part of csa and hca layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kernels.entry_ranges import EntryRanges
from model.cache.parts import CachePart, CompressorPart, GrowingPart
from model.errors import ConfigError
from model.forward.context import Context
from model.layers.rope import Rotary, Rotation
from model.mixers.base import StoredFormat, require, yarn_of
from model.mixers.compressor import Compressor
from model.mixers.sliding import History, SlidingWindowAttention
from model.precision import main_layout
from model.work import Work

if TYPE_CHECKING:
    from model.cache.layer_cache import LayerCache
    from model.config import ModelConfig


class CompressedAttention(SlidingWindowAttention):
    """Attention to the sliding window and to compressed entries. Subclasses set the ratio, whether blocks overlap, and
    the entries that a query attends to."""

    ratio_field: ClassVar[str]
    """The configuration field with the tokens per entry."""
    overlap: ClassVar[bool]

    @classmethod
    def ratio_of(cls, config: ModelConfig) -> int:
        """Return the tokens per entry."""
        return getattr(config, cls.ratio_field)

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        super().check(config)
        ratio = cls.ratio_of(config)
        require(ratio >= 2, f"must be at least 2, found {ratio}", cls.ratio_field)

    @classmethod
    def check_length(cls, config: ModelConfig, tokens: int) -> None:
        ratio = cls.ratio_of(config)
        if ratio > tokens:
            raise ConfigError(
                f"{cls.ratio_field}: {ratio} tokens per entry leave a {tokens}-token sequence without any entry"
            )

    @classmethod
    def rotary(cls, config: ModelConfig) -> Rotary:
        return Rotary(config.rope_head_dim, config.compress_rope_theta, yarn_of(config))

    @classmethod
    def cache_parts(cls, config: ModelConfig) -> dict[str, CachePart]:
        ratio = cls.ratio_of(config)
        return {
            **super().cache_parts(config),
            "tail": CompressorPart(ratio, config.head_dim, cls.overlap),
            "entries": GrowingPart(main_layout(config), ratio, cls.name),
        }

    @classmethod
    def stored_formats(cls, config: ModelConfig) -> list[StoredFormat]:
        return [stored._replace(tensors=2) for stored in super().stored_formats(config)]

    @classmethod
    def work(cls, config: ModelConfig, tokens: int) -> list[Work]:
        rows = 2 * config.head_dim if cls.overlap else config.head_dim
        compressor = Work("compressors", "linear", "bf16", 2.0 * 2 * config.hidden_size * rows)
        return [*super().work(config, tokens), compressor]

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.ratio = self.ratio_of(config)
        self.compressor = Compressor(config, config.head_dim, self.ratio, self.overlap, self.rotary(config))

    def project_history(self, x: Tensor, latent: Tensor, rotation: Rotation, context: Context) -> History:
        return History(rows=self.compressor.project(x))

    def pool(self, history: History, context: Context) -> Tensor:
        """Return the entries of whole sequences, as stored: [B, n, head_dim]."""
        assert history.rows is not None
        layout = self.precision.main_rounding(self.training, context.aux)
        return self.compressor.pool(history.rows, context, layout)

    def append(self, history: History, context: Context, cache: LayerCache) -> None:
        """Append the entries that the new tokens complete to the cache."""
        assert history.rows is not None
        self.compressor.append(history.rows, cache.tail, cache.entries, context)

    def split_sizes(self) -> dict[str, tuple[int, ...]]:
        return {f"compressor.{name}": rows for name, rows in self.compressor.split_sizes().items()}


def visible_entries(context: Context, ratio: int) -> Tensor:
    """Return how many entries, counted from the first, each query may use: int64 [B or 1, S].

    Token t (from 0) sees entry s iff s < (t + 1) // ratio: a block becomes visible to its own last token. The
    report's wording could also mean one token later. This is the rule of the released code, for which the released
    weights were trained.
    """
    return context.once(("visible entries", ratio), lambda: (context.positions + 1) // ratio)


def entry_ranges(context: Context, ratio: int) -> EntryRanges:
    """Return the entries of ``ratio`` tokens each that the queries of whole sequences may use."""
    if context.documents is not None:
        return context.documents.blocks(ratio).visible
    end = visible_entries(context, ratio)
    return EntryRanges(torch.zeros_like(end), end)
