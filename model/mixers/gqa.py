"""Grouped-query attention over all past tokens: the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cache_io import EntryLayout, unpack
from kernels.grouped_attention import grouped_attention
from kernels.paged_attention import EntrySet
from kernels.sparse_attention import TiledAttention
from model.cache.parts import CachePart, GrowingPart, RecurrentPart
from model.forward.context import Context
from model.forward.execution import in_tiles
from model.layers.linear import Linear
from model.layers.rope import Rotary, Rotation
from model.mixers.base import Mixer, StoredFormat, require
from model.mixers.batch_invariant import by_tokens, entry_tiles
from model.mixers.options import check_count
from model.mixers.short_convolution import ShortConvolution
from model.work import Work

if TYPE_CHECKING:
    from model.cache.layer_cache import LayerCache
    from model.config import ModelConfig


class Projected(NamedTuple):
    """Inputs of the attention."""

    query: Tensor
    """[B, S, H, head_dim], rotated."""
    key: Tensor
    """[B, S, num_kv_heads * head_dim], before the convolution and the rotation."""
    value: Tensor
    """[B, S, num_kv_heads, head_dim]"""


class GroupedQueryAttention(Mixer):
    """``num_heads`` query heads share ``num_kv_heads`` key and value heads. Rotary positions on the whole head.

    With the option ``conv_kernel``, a short causal convolution with SiLU runs over the keys before their rotation, so
    that a key also depends on the tokens before its own.
    """

    name = "gqa"
    options = {"conv_kernel": None}  # noqa: RUF012
    """``conv_kernel``: width of the convolution in tokens, including the newest; None for no convolution."""
    formats = ("gqa_format",)
    batch_invariant_widths = ("head_dim",)

    @classmethod
    def layout(cls, config: ModelConfig) -> EntryLayout:
        """Return the layout of a token's keys and values of all heads. Where heads are narrower than a block of the
        format, neighbors share a scale."""
        return EntryLayout(2 * config.num_kv_heads * config.head_dim, config.gqa_format)

    @classmethod
    def check_options(cls, options: Mapping[str, Any], key: str) -> None:
        check_count(f"{key}.conv_kernel", options["conv_kernel"], least=2, optional=True)

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        heads, kv_heads = config.num_heads, config.num_kv_heads
        require(heads % kv_heads == 0, f"{heads} query heads do not divide into num_kv_heads {kv_heads}", "num_heads")

    @classmethod
    def conv_kernel(cls, config: ModelConfig) -> int | None:
        return config.mixer_options[cls.name]["conv_kernel"]

    @classmethod
    def rotary(cls, config: ModelConfig) -> Rotary:
        return Rotary(config.head_dim, config.rope_theta)

    @classmethod
    def steps_have_fixed_shape(cls, config: ModelConfig, device: str) -> bool:
        # On a GPU, attention synchronizes for the longest length. The state of a convolution is found by its position.
        return device == "cpu" and cls.conv_kernel(config) is None

    @classmethod
    def cache_parts(cls, config: ModelConfig) -> dict[str, CachePart]:
        parts: dict[str, CachePart] = {"entries": GrowingPart(cls.layout(config), 1, cls.name)}
        if (kernel := cls.conv_kernel(config)) is not None:
            parts["conv_tail"] = RecurrentPart((kernel - 1, config.num_kv_heads * config.head_dim))
        return parts

    @classmethod
    def stored_formats(cls, config: ModelConfig) -> list[StoredFormat]:
        return [StoredFormat("gqa keys and values", config.gqa_format, 1)]

    @classmethod
    def work(cls, config: ModelConfig, tokens: int) -> list[Work]:
        c = config
        heads, kv, kernel = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, cls.conv_kernel(c)
        convolution = [Work("gqa convolution", "linear", "bf16", 2.0 * kernel * kv)] if kernel is not None else []
        return [
            Work("attention projections", "linear", "fp8", 2.0 * 2 * c.hidden_size * (heads + kv)),
            *convolution,
            Work("core attention, gqa", "core", "bf16", 4.0 * heads * tokens),
        ]

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        c = config
        self.wq = Linear(c.hidden_size, c.num_heads * c.head_dim)
        self.wk = Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.wv = Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.wo = Linear(c.num_heads * c.head_dim, c.hidden_size)
        kernel = self.conv_kernel(c)
        self.conv = None if kernel is None else ShortConvolution(c.num_kv_heads * c.head_dim, kernel, bias=False)

    def set_config(self, config: ModelConfig) -> None:
        super().set_config(config)
        self.entry_layout = self.layout(config)

    def zero_output(self) -> None:
        self.wo.weight.zero_()

    def project(self, x: Tensor, rotation: Rotation | None, context: Context, cached: bool) -> Projected:
        assert rotation is not None
        query = rotation.apply(self.wq(x).unflatten(-1, (self.config.num_heads, -1)))
        return Projected(query, self.wk(x), self.wv(x).unflatten(-1, (self.config.num_kv_heads, -1)))

    def mix(self, projected: Projected, context: Context, cache: LayerCache | None) -> Tensor:
        """Return the attention's outputs, float32 [B, S, H, head_dim]."""
        query, key, value = projected
        if self.conv is not None:
            key, tail = self.conv(key.float(), context, None if cache is None else cache.conv_tail.read())
            if cache is not None:
                cache.conv_tail.append(tail)
        parts = key, value, context.rotation[self.name]
        rows = in_tiles(self._rows, *parts) if context.batch_invariant else self._rows(*parts)
        rows = self.precision.round_to(rows, "gqa", self.entry_layout, self.training, context.aux)
        if cache is None:
            mask = None if context.documents is None else context.documents.causal_mask().unsqueeze(1)
            query, key, value = (x.transpose(1, 2) for x in (query, *self._heads(rows)))
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            return out.transpose(1, 2)
        cache.entries.append(rows)
        visible = context.positions + 1
        if context.batch_invariant:
            return self._token_by_token(query, EntrySet(cache.entries.pages, visible=visible))
        pages, kv_heads = cache.entries.pages, self.config.num_kv_heads
        return grouped_attention(query, pages, visible, kv_heads, self.entry_layout)

    def _rows(self, key: Tensor, value: Tensor, rotation: Rotation) -> Tensor:
        """Return each head's rotated key concatenated with its value, [B, S, num_kv_heads * 2 * head_dim]."""
        return torch.cat((rotation.apply(key.unflatten(-1, value.shape[2:])), value), dim=-1).flatten(2)

    def _heads(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Split rows [..., num_kv_heads * 2 * head_dim] into keys and values [..., num_kv_heads, head_dim]."""
        return rows.unflatten(-1, (self.config.num_kv_heads, -1)).chunk(2, dim=-1)

    def _token_by_token(self, query: Tensor, history: EntrySet) -> Tensor:
        c = self.config
        kv, group = c.num_kv_heads, c.num_heads // c.num_kv_heads

        def attend(query: Tensor, sequences: Tensor, queries: Tensor) -> Tensor:
            heads = query.view(-1, group, c.head_dim)  # every key-value head on its own
            attention = TiledAttention(heads)
            for rows, mask in entry_tiles(history, sequences, queries):
                both = self._heads(unpack(rows, self.entry_layout))
                key, value = (x.transpose(1, 2).flatten(0, 1) for x in both)
                attention.add(key, mask.repeat_interleave(kv, dim=0), value)
            return attention.output().view_as(query)

        return by_tokens(attend, query)

    def output(self, mixed: Tensor, rotation: Rotation | None) -> Tensor:
        return self.wo(mixed.flatten(2))
