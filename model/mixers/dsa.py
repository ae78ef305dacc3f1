"""DeepSeek sparse attention (DeepSeek-V3.2 report 2.1): latent attention to the tokens that an indexer selects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.autocast import cast, detached, product_dtype
from kernels.hadamard import hadamard
from kernels.index_scores import index_scores
from kernels.index_topk import index_topk, select_topk
from kernels.paged_attention import EntrySet
from kernels.sparse_attention import sparse_attention
from model.cache.parts import CachePart, GrowingPart
from model.forward.aux_outputs import AuxOutputs
from model.forward.context import Context
from model.layers.linear import Linear
from model.layers.norm import LayerNorm
from model.layers.rope import Rotation
from model.mixers.base import StoredFormat, require
from model.mixers.indexer import as_mask, indexer_kl, measure_selection
from model.mixers.mla import IndexInputs, MultiHeadLatentAttention, Projected
from model.precision import index_layout
from model.work import Work, product_format

if TYPE_CHECKING:
    from model.cache.layer_cache import LayerCache
    from model.config import ModelConfig

KEY_NORM_EPS = 1e-6
"""The released code does not take it from the configuration."""

_QUERIES = 128
"""Queries scored together."""
_GATHER_COST = 16
"""Number of heads whose products with a latent take as long as gathering it and adding its gradient (on a CPU)."""


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
        query = self.queries(narrow, latent, rotation)
        return Projected(self.absorb(query) if cached else query, self.project_rows(narrow, rotation, context), index)

    def attend(self, projected: Projected, context: Context) -> Tensor:
        """Attend within whole sequences to the tokens that the indexer selects, or in dense mode to all past ones."""
        query, rows, index = projected
        assert index is not None
        chosen = None if context.attention == "dense" else self.choose(index, context)
        if chosen is not None and self.gathers(*chosen.shape[1:]):
            latents, mass = sparse_attention(
                self.absorb(query),
                None,
                rows,
                None,
                None,
                scale=self.scale,
                value_size=self.latent_dims,
                chosen=chosen,
                with_mass=context.aux is not None,
            )
            out = self.values(latents)
        else:
            key, value = self.expand(rows)
            mask = None if context.documents is None else context.documents.causal_mask()
            if chosen is not None:
                mask = as_mask(chosen, rows.shape[1])
            out = self.attend_per_head(query, key, value, mask)
            mass = None if context.aux is None else self.attention_mass(query, key, context, mask)
            if mass is not None and chosen is not None:
                mass = mass.gather(-1, chosen.clamp(min=0)).masked_fill(chosen < 0, 0.0)
        if context.aux is not None:
            assert mass is not None
            self.train_indexer(context.aux, mass, chosen, projected, context)
        return out

    def gathers(self, tokens: int, chosen: int) -> bool:
        """Return whether to attend to ``chosen`` gathered latents instead of the masked keys of all ``tokens``.

        Multiply-adds per query and head are ``chosen * (2 * kv_lora_rank + qk_rope_head_dim)`` for gathered latents,
        which all heads share, and ``tokens * (qk_nope_head_dim + qk_rope_head_dim + v_head_dim)`` for the keys and
        values of every head. Gathering costs as much as :data:`_GATHER_COST` more heads. At V3.2's sizes, latents are
        gathered from 7,834 tokens on.
        """
        sizes, heads = self.sizes(self.config), self.config.num_heads
        gathered = chosen * (2 * sizes.kv_lora_rank + sizes.qk_rope_head_dim) * (heads + _GATHER_COST)
        return gathered < tokens * (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim + sizes.v_head_dim) * heads

    @torch.no_grad()
    def choose(self, index: IndexInputs, context: Context) -> Tensor:
        """Return the selected tokens of every query, by blocks of queries: int64 [B, S, K], -1 in unused slots."""
        tokens, pieces = index.keys.shape[1], []
        for block in _query_blocks(tokens):
            scores = index_scores(index.query[:, block], index.keys[:, : block.stop], index.weights[:, block])
            scores = scores.to(self.precision.score_dtype)
            pieces.append(select_topk(scores, _visible(context, block), min(self.config.index_topk, tokens)))
        return torch.cat(pieces, dim=1)

    @torch.no_grad()
    def attention_mass(self, query: Tensor, key: Tensor, context: Context, mask: Tensor | None = None) -> Tensor:
        """Return attention probabilities under a mask, bool [B, S, S], or of all past tokens, summed over heads:
        float32 [B, S, S]."""
        B, S = query.shape[:2]
        mass = query.new_zeros(B, S, S, dtype=torch.float32)
        query, key = (cast(x, key.dtype).transpose(1, 2) for x in (query * self.scale, key))
        for block in _query_blocks(S):
            visible = _visible(context, block) if mask is None else mask[:, block, : block.stop]
            logits = (query[:, :, block] @ key[:, :, : block.stop].transpose(2, 3)).float()
            weights = logits.masked_fill_(~visible.unsqueeze(1), float("-inf")).softmax(-1)
            mass[:, block, : block.stop] = weights.sum(1)
        return mass

    def train_indexer(
        self, aux: AuxOutputs, mass: Tensor, chosen: Tensor | None, projected: Projected, context: Context
    ) -> None:
        """Add the indexer's loss, and its selection's metrics if wanted, to ``aux``.

        ``mass`` is the attention mass of all tokens [B, S, S], or of the ``chosen`` ones [B, S, K].
        """
        query, rows, index = projected
        assert index is not None
        inputs, everything = (index.query, index.keys, index.weights), slice(0, rows.shape[1])
        permitted = _visible(context, everything) if chosen is None else chosen >= 0
        scores = index_scores(*inputs, permitted if chosen is None else None, chosen)
        aux.losses["indexer_kl"][self.layer] = indexer_kl(mass, scores, permitted)
        if aux.measure_selection:
            if chosen is not None:
                permitted = _visible(context, everything)
                scores = index_scores(*inputs, permitted)
                mass = self.attention_mass(query, self.expand(rows)[0], context)
            measure_selection(aux, self.layer, mass, scores.detach(), permitted, self.config)

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


def _query_blocks(tokens: int) -> Iterator[slice]:
    """Yield slices of at most ``_QUERIES`` consecutive queries."""
    for begin in range(0, tokens, _QUERIES):
        yield slice(begin, min(begin + _QUERIES, tokens))


def _visible(context: Context, block: slice) -> Tensor:
    """Return the mask of the tokens before ``block.stop`` that each query of the block may see: bool [B or 1, queries,
    stop]."""
    positions = context.positions[:, block]
    own = torch.arange(block.start, block.stop, device=positions.device)
    token = torch.arange(block.stop, device=positions.device)
    return (token <= own.unsqueeze(-1)) & (token >= (own - positions).unsqueeze(-1))
