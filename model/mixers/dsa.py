"""DeepSeek sparse attention (DeepSeek-V3.2 report 2.1): latent attention to the tokens that an indexer selects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.autocast import cast, detached, product_dtype
from kernels.hadamard import hadamard
from kernels.index_scores import index_scores
from kernels.index_topk import index_topk
from kernels.paged_attention import EntrySet
from kernels.sparse_attention import sparse_attention
from model.cache.parts import CachePart, GrowingPart
from model.forward.context import Context
from model.layers.linear import Linear
from model.layers.norm import LayerNorm
from model.layers.rope import Rotation
from model.mixers.base import StoredFormat, require
from model.mixers.indexer import attend_selected
from model.mixers.mla import IndexInputs, MultiHeadLatentAttention, Projected
from model.precision import index_layout
from model.work import Work, product_format

if TYPE_CHECKING:
    from model.cache.layer_cache import LayerCache
    from model.config import ModelConfig

KEY_NORM_EPS = 1e-6
"""The released code does not take it from the configuration."""


class TokenIndexer(nn.Module):
    """Scores tokens for a query. Its queries share the attention's latent; every token has one key."""

    def __init__(self, config: ModelConfig, q_lora_rank: int):
        super().__init__()
        self.heads, self.head_dim = config.index_heads, config.index_head_dim
        self.wq_b = Linear(q_lora_rank, self.heads * self.head_dim)
        self.wk = Linear(config.hidden_size, self.head_dim)
        self.k_norm = LayerNorm(self.head_dim, KEY_NORM_EPS)
        self.weights_proj = Linear(config.hidden_size, self.heads, full_precision=True)

    def queries(self, latent: Tensor, rotation: Rotation) -> Tensor:
        """Return rotated queries [B, S, heads, head_dim]. Pairs of rotary dims lie half a head's rotary dims apart."""
        return hadamard(rotation.apply_halves(self.wq_b(latent).unflatten(-1, (self.heads, -1))))

    def head_weights(self, x: Tensor) -> Tensor:
        """Return scaled head weights [B, S, heads]."""
        return self.weights_proj(x) * (self.head_dim * self.heads) ** -0.5

    def keys(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Return rotated keys [B, S, head_dim]."""
        return hadamard(rotation.apply_halves(self.k_norm(self.wk(x))))


class DeepSeekSparseAttention(MultiHeadLatentAttention):
    """Attention of every query to ``index_topk`` past tokens, itself among the candidates."""

    name = "dsa"
    options: ClassVar[dict[str, Any]] = {k: v for k, v in MultiHeadLatentAttention.options.items() if k != "rope"}
    formats = (*MultiHeadLatentAttention.formats, "index_format")
    batch_invariant_widths = (*MultiHeadLatentAttention.batch_invariant_widths, "index_head_dim")
    direct_queries = False

    # --- declarations

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        super().check(config)
        width, rope = config.index_head_dim, cls.sizes(config).qk_rope_head_dim
        require(
            width & (width - 1) == 0,
            f"index_head_dim: must be a power of two for the Hadamard rotation, found {width}",
        )
        require(
            rope <= width, f"mixer_options.{cls.name}.qk_rope_head_dim: {rope} is wider than index_head_dim {width}"
        )

    @classmethod
    def indexer_ratio(cls, config: ModelConfig) -> int:
        return 1

    @classmethod
    def cache_parts(cls, config: ModelConfig) -> dict[str, CachePart]:
        return {**super().cache_parts(config), "index": GrowingPart(index_layout(config), 1, "index")}

    @classmethod
    def stored_formats(cls, config: ModelConfig) -> list[StoredFormat]:
        index = StoredFormat("index queries and keys (after Hadamard)", config.index_format, 2)
        return [*super().stored_formats(config), index]

    @classmethod
    def attended_tokens(cls, config: ModelConfig, tokens: int) -> int:
        return min(config.index_topk, tokens)

    @classmethod
    def work(cls, config: ModelConfig, tokens: int) -> list[Work]:
        c, rank = config, cls.sizes(config).q_lora_rank
        assert rank is not None
        heads = c.index_heads * c.index_head_dim
        projections = rank * heads + c.hidden_size * c.index_head_dim
        return [
            *super().work(c, tokens),
            Work("index queries and token keys", "linear", "fp8", 2.0 * projections),
            Work("index head weights", "linear", "bf16", 2.0 * c.hidden_size * c.index_heads),
            Work("index scores", "index", product_format(c.index_format), 2.0 * heads * tokens),
        ]

    # --- the layer

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        rank = self.sizes(config).q_lora_rank
        assert rank is not None
        self.indexer = TokenIndexer(config, rank)

    def project(self, x: Tensor, rotation: Rotation | None, context: Context, cached: bool) -> Projected:
        assert rotation is not None
        narrow = cast(x, product_dtype(x))  # once for all products
        latent = self.query_latent(narrow)
        assert latent is not None
        # The indexer learns from its own loss only and the network from the language-model loss only: the indexer's
        # inputs are detached here, and its selection is an integer.
        index_query = self.indexer.queries(detached(latent), rotation)
        index_keys = self.indexer.keys(detached(narrow), rotation)
        index = IndexInputs(
            self.precision.round_index(index_query, self.training, context.aux),
            self.indexer.head_weights(detached(x)),
            self.precision.round_index(index_keys, self.training, context.aux),
        )
        query = self.absorb(self.queries(narrow, latent, rotation))
        return Projected(query, self.project_rows(narrow, rotation, context), index)

    def attend(self, projected: Projected, context: Context) -> Tensor:
        """Attend within whole sequences to the latents of the selected tokens."""
        query, rows, index = projected
        assert index is not None
        if context.documents is not None:
            visible = context.documents.causal_mask()
        else:
            tokens = rows.shape[1]
            visible = torch.ones(1, tokens, tokens, dtype=torch.bool, device=rows.device).tril()
        scores = index_scores(index.query, index.keys, index.weights, visible)

        def attend(mask: Tensor) -> tuple[Tensor, Tensor | None]:
            return sparse_attention(query, None, rows, mask, None, scale=self.scale, value_size=self.latent_dims)

        return self.values(attend_selected(scores, visible, self.config, self.layer, context, attend))

    def select(self, projected: Projected, context: Context, cache: LayerCache) -> EntrySet:
        assert projected.indexed is not None
        query, weights, keys = projected.indexed
        cache.index.append(keys)
        if self.training:  # stored keys are always rounded, so the queries must be, too
            query = self.precision.round_index(query, training=False)
        chosen = index_topk(
            query,
            cache.index.pages,
            cache.index.layout,
            weights,
            context.positions + 1,
            self.config.index_topk,
            self.precision.score_dtype,
            context.batch_invariant,
        )
        return EntrySet(cache.latents.pages, chosen=chosen)
