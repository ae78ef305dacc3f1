"""Sliding-window attention with latent queries, one shared key-value head, a sink and grouped output (report 2.3).

csa and hca layers are this plus a compressed history. The released Flash model begins with plain ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kernels.autocast import cast, product_dtype
from kernels.cache_io import FORMAT_BITS
from kernels.entry_ranges import EntryRanges
from kernels.paged_attention import EntrySet, paged_attention
from kernels.projection import grouped_output, key_value, latent_query, packed_key_value
from kernels.sparse_attention import EntryMass, sparse_attention
from model.cache.parts import CachePart, WindowPart
from model.forward.context import Context
from model.layers.linear import Linear
from model.layers.norm import RMSNorm
from model.layers.rope import Rotary, Rotation
from model.mixers.base import Mixer, StoredFormat, require
from model.mixers.batch_invariant import invariant_attention
from model.precision import main_layout
from model.work import Work

if TYPE_CHECKING:
    from model.cache.layer_cache import LayerCache
    from model.config import ModelConfig


class History(NamedTuple):
    """Inputs of the compressed history, [B, S, ...] each. Plain sliding layers have none."""

    rows: Tensor | None = None
    """float32: values and gates of the compressor."""
    index_rows: Tensor | None = None
    """float32: values and gates of the indexer's compressor."""
    index_query: Tensor | None = None
    """float32 [B, S, index_heads, index_head_dim]"""
    index_weights: Tensor | None = None
    """float32 [B, S, index_heads]"""


class Projected(NamedTuple):
    """Inputs of the attention."""

    query: Tensor
    """float32 [B, S, H, head_dim]"""
    key_value: Tensor
    """float32 [B, S, head_dim], or for a cache packed rows, uint8 [B, S, nbytes]."""
    history: History


class SlidingWindowAttention(Mixer):
    """Attention of every query to the last ``window`` tokens, itself included. Key and value are one vector [head_dim].

    Subclasses add a compressed history: :meth:`attend` without a cache, :meth:`select` with one.
    """

    name = "sliding"
    one_key_value = True
    formats: ClassVar[tuple[str, ...]] = ("kv_format", "rope_format")
    batch_invariant_widths: ClassVar[tuple[str, ...]] = ("q_lora_rank", "o_lora_rank", "head_dim")

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        c = config
        require(
            c.num_heads % c.o_groups == 0,
            f"{c.num_heads} heads do not divide into o_groups {c.o_groups} groups",
            "num_heads",
        )
        body, bits, rope_bits = c.head_dim - c.rope_head_dim, FORMAT_BITS[c.kv_format], FORMAT_BITS[c.rope_format]
        require(
            body * bits % rope_bits == 0,
            f"{body} unrotated dims in kv_format {c.kv_format} end where no rotary dim in rope_format "
            f"{c.rope_format} can begin; expected a multiple of {rope_bits // bits}",
            "head_dim",
        )

    @classmethod
    def rotary(cls, config: ModelConfig) -> Rotary:
        return Rotary(config.rope_head_dim, config.rope_theta)

    @classmethod
    def steps_have_fixed_shape(cls, config: ModelConfig, device: str) -> bool:
        return True

    @classmethod
    def cache_parts(cls, config: ModelConfig) -> dict[str, CachePart]:
        return {"window": WindowPart(main_layout(config), config.window)}

    @classmethod
    def stored_formats(cls, config: ModelConfig) -> list[StoredFormat]:
        return [
            StoredFormat("window and compressed entries, unrotated dims", config.kv_format, 1),
            StoredFormat("window and compressed entries, rotary dims", config.rope_format, 1),
        ]

    @classmethod
    def work(cls, config: ModelConfig, tokens: int) -> list[Work]:
        c = config
        d, heads, latent = c.hidden_size, c.num_heads * c.head_dim, c.q_lora_rank
        projections = d * latent + latent * heads + d * c.head_dim + c.o_groups * c.o_lora_rank * d
        attended = min(tokens, c.window) + cls.attended_entries(c, tokens)
        return [
            Work("attention projections", "linear", "fp8", 2.0 * projections),
            # The released code stores wo_a in FP8 and multiplies it in BF16.
            Work("grouped output projection", "linear", "bf16", 2.0 * heads * c.o_lora_rank),
            Work(f"core attention, {cls.name}", "core", "bf16", 4.0 * heads * attended),
        ]

    @classmethod
    def attended_entries(cls, config: ModelConfig, tokens: int) -> int:
        """Return the number of compressed entries that the ``tokens``-th token attends to."""
        return 0

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

    def init_weights(self, std: float) -> None:
        self.wo_a.normal_(std=std)
        self.sink.zero_()

    def zero_output(self) -> None:
        self.wo_b.weight.zero_()

    def cast_weights(self, dtype: torch.dtype) -> None:
        self.wo_a = nn.Parameter(self.wo_a.to(dtype), requires_grad=False)

    def project(self, x: Tensor, rotation: Rotation | None, context: Context, cached: bool) -> Projected:
        assert rotation is not None
        narrow = cast(x, product_dtype(x))  # once for all products
        heads, eps = self.config.num_heads, self.config.norm_eps
        latent, query = latent_query(
            narrow, self.wq_a.weight, self.q_norm.weight, self.wq_b.weight, *rotation, heads, eps
        )
        history = self.project_history(x, latent, rotation, context)
        inputs = narrow, self.wkv.weight, self.kv_norm.weight, *rotation, eps
        if cached:
            return Projected(query, packed_key_value(*inputs, self.precision.main_layout), history)
        return Projected(query, self.precision.round_main(key_value(*inputs), self.training, context.aux), history)

    def project_history(self, x: Tensor, latent: Tensor, rotation: Rotation, context: Context) -> History:
        """Project x [B, S, hidden] and the queries' latent [B, S, q_lora_rank] to the history's inputs."""
        return History()

    def mix(self, projected: Projected, context: Context, cache: LayerCache | None) -> Tensor:
        """Return the attention's outputs, float32 [B, S, H, head_dim]."""
        if cache is None:
            return self.attend(projected, context)
        entries = self.select(projected.history, context, cache)
        query, rows, layout = projected.query, projected.key_value, self.precision.main_layout
        if context.batch_invariant:
            return invariant_attention(query, cache.window.extend(rows), entries, self.sink, layout, context)
        inputs = query, cache.window.attended(rows), entries, self.sink, layout, self.config.window
        return paged_attention(*inputs, weight_dtype=self.wq_b.weight.dtype)

    def attend(self, projected: Projected, context: Context) -> Tensor:
        """Attend within whole sequences."""
        return self.core_attention(projected, None, None, context)[0]

    def select(self, history: History, context: Context, cache: LayerCache) -> EntrySet | None:
        """Append the new entries to the cache and return those that each query attends to, if any."""
        return None

    def core_attention(
        self,
        projected: Projected,
        entries: Tensor | None,
        visible: EntryRanges | None,
        context: Context,
        chosen: Tensor | None = None,
    ) -> tuple[Tensor, EntryMass | None]:
        """:func:`kernels.sparse_attention.sparse_attention` with the layer's sink and window."""
        query, window = projected.query, self.config.window
        reach = None
        if context.documents is not None:
            reach = (context.positions + 1).clamp(max=window).expand(query.shape[:2])
        return sparse_attention(query, projected.key_value, entries, visible, self.sink, window, reach, chosen=chosen)

    def output(self, mixed: Tensor, rotation: Rotation | None) -> Tensor:
        """Project back to [B, S, hidden] by a grouped low-rank projection (report 2.3.1)."""
        assert rotation is not None
        return grouped_output(mixed, *rotation, self.wo_a, self.wo_b.weight)
