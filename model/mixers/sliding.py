"""Sliding-window attention with latent queries, one shared key-value head, a sink and grouped output (report 2.3).

csa and hca layers are this plus a compressed history; the released models begin with plain ones (Flash).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.autocast import product_dtype
from kernels.cache_io import pack, unpack
from kernels.rms_norm import rms_normalize
from kernels.sparse_attention import sparse_attention, token_attention
from model.cache_parts import LayerCache, ring_ages
from model.config import ModelConfig
from model.linear import Linear, linear
from model.mixers.base import Context, Mixer
from model.mixers.cached import Selection, cached_attention
from model.norm import RMSNorm
from model.rope import Rotation


class SlidingWindowAttention(Mixer):
    """Every query sees the last ``window`` tokens, itself included. Key and value are one vector [head_dim]."""

    name = "sliding"

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        c = config
        self.wq_a = Linear(c.hidden_size, c.q_lora_rank)
        self.q_norm = RMSNorm(c.q_lora_rank, c.norm_eps)
        self.wq_b = Linear(c.q_lora_rank, c.num_heads * c.head_dim)
        self.wkv = Linear(c.hidden_size, c.head_dim)
        self.kv_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.sink = nn.Parameter(torch.zeros(c.num_heads))
        group = c.num_heads // c.o_groups * c.head_dim
        self.wo_a = nn.Parameter(torch.empty(c.o_groups, c.o_lora_rank, group))
        self.wo_b = Linear(c.o_groups * c.o_lora_rank, c.hidden_size)

    def project(self, x: Tensor, rotation: Rotation, cached: bool) -> dict[str, Tensor]:
        """query [B, S, H, head_dim], what :meth:`project_history` adds, and kv [B, S, head_dim]; for a cache, this also
        as packed window_rows uint8 [B, S, nbytes]."""
        c = self.config
        narrow = x.to(product_dtype(x))  # once for all products
        latent = self.q_norm(self.wq_a(narrow))
        query = rms_normalize(self.wq_b(latent).unflatten(-1, (c.num_heads, c.head_dim)), c.norm_eps)
        kv = self.precision.round_main(rotation.apply(self.kv_norm(self.wkv(narrow))), self.training)
        projected = {"query": rotation.apply(query), "kv": kv, **self.project_history(x, latent, rotation)}
        return projected | {"window_rows": pack(kv, self.precision.main_layout)} if cached else projected

    def project_history(self, x: Tensor, latent: Tensor, rotation: Rotation) -> dict[str, Tensor]:
        """What a subclass needs for its compressed history. latent [B, S, q_lora_rank]."""
        return {}

    def mix(self, projected: dict[str, Tensor], context: Context, cache: LayerCache | None) -> Tensor:
        if cache is None:
            return self.attend(projected, context)
        selection = self.select(projected, context, cache)
        window_rows = cache.window.extend(projected["window_rows"])
        return cached_attention(projected["query"], window_rows, selection, self.sink, self.precision, context)

    def attend(self, projected: dict[str, Tensor], context: Context) -> Tensor:
        """Attention within whole sequences."""
        return self.core_attention(projected, None, None, context)[0]

    def select(self, projected: dict[str, Tensor], context: Context, cache: LayerCache) -> Selection | None:
        """Append the new entries to the cache, and say which ones each query attends to; None: only the window."""
        return None

    def core_attention(
        self, projected: dict[str, Tensor], entries: Tensor | None, mask: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor | None]:
        """:func:`kernels.sparse_attention.sparse_attention` with this layer's sink and window."""
        query, window = projected["query"], self.config.window
        reach = None
        if context.documents is not None:
            reach = (context.positions + 1).clamp(max=window).expand(query.shape[:2])
        return sparse_attention(query, projected["kv"], entries, mask, self.sink, window, reach)

    def past(self, cache: LayerCache) -> dict[str, Tensor]:
        return {"window": cache.window.ring.data}

    def keep(self, projected: dict[str, Tensor], past: dict[str, Tensor], position: Tensor) -> dict[str, Tensor]:
        return {"window": projected.pop("window_rows")}

    def attend_token(
        self,
        projected: dict[str, Tensor],
        past: dict[str, Tensor],
        paused: dict[str, Tensor],
        position: Tensor,
    ) -> Tensor:
        # New rows as they are rounded, not as packed: compiled, unpacking what has just been packed undoes no rounding.
        window = self.unpacked(past["window"][0])
        age = ring_ages(len(window), position)
        seen = (age < self.config.window - 1) & (age < position)
        itself = torch.ones(1, dtype=torch.bool, device=position.device)
        near = [(window, seen), (projected["kv"][0], itself)]
        entries = self.attended_entries(projected, past, paused, position)
        return token_attention(projected["query"][0, 0], near + entries, self.sink).view_as(projected["query"])

    def attended_entries(
        self, projected: dict[str, Tensor], past: dict[str, Tensor], paused: dict[str, Tensor], position: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Entries float32 [T, head_dim] and their masks bool [T]."""
        return []

    def unpacked(self, rows: Tensor) -> Tensor:
        return unpack(rows, self.precision.main_layout)

    def output(self, mixed: Tensor, rotation: Rotation) -> Tensor:
        """Back to [B, S, hidden] by a grouped low-rank projection (report 2.3.1)."""
        # The values carry rotary dims at their own positions; turning the sum back by the query's leaves the offset.
        out = rotation.apply(mixed, inverse=True)
        groups = out.flatten(2).unflatten(-1, (self.config.o_groups, -1))
        return self.wo_b(linear(groups, self.wo_a).flatten(2))
