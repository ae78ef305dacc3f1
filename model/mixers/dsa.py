"""DeepSeek sparse attention (DeepSeek-V3.2 report 2.1): latent attention to the tokens that an indexer selects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.autocast import cast, detached, product_dtype
from kernels.chosen_rows import GATHER_COST, chosen_mask
from kernels.entry_ranges import EntryRanges
from kernels.hadamard import hadamard
from kernels.indexer_kl import indexer_kl
from kernels.paged_attention import EntrySet
from kernels.sparse_attention import EntryMass, sparse_attention
from model.cache.parts import CachePart, GrowingPart
from model.forward.context import Context
from model.layers.linear import Linear
from model.layers.norm import LayerNorm
from model.layers.rope import Rotation
from model.mixers.base import StoredFormat
from model.mixers.indexer import IndexInputs, check_index_dims, index_format, measure_selection, select_stored
from model.mixers.mla import MultiHeadLatentAttention, Projected
from model.precision import index_layout
from model.work import Work, product_format

if TYPE_CHECKING:
    from model.cache.layer_cache import LayerCache
    from model.config import ModelConfig

KEY_NORM_EPS = 1e-6
"""The released code does not take it from the configuration."""

_QUERIES = 128
"""Queries whose attention mass is computed together."""
_EVERY = slice(None)


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
        check_index_dims(config, f"mixer_options.{cls.name}.qk_rope_head_dim", cls.sizes(config).qk_rope_head_dim)

    @classmethod
    def indexer_ratio(cls, config: ModelConfig) -> int:
        return 1

    @classmethod
    def cache_parts(cls, config: ModelConfig) -> dict[str, CachePart]:
        return {**super().cache_parts(config), "index": GrowingPart(index_layout(config), 1, "index")}

    @classmethod
    def stored_formats(cls, config: ModelConfig) -> list[StoredFormat]:
        return [*super().stored_formats(config), index_format(config)]

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
            self.precision.round_index(index_keys, self.training, context.aux),
            self.indexer.head_weights(detached(x)),
        )
        query = self.queries(narrow, latent, rotation)
        return Projected(self.absorb(query) if cached else query, self.project_rows(narrow, rotation, context), index)

    def attend(self, projected: Projected, context: Context) -> Tensor:
        """Attend within whole sequences to the tokens that the indexer selects, or in dense mode to all past ones."""
        query, rows, index = projected
        assert index is not None
        visible = _token_ranges(context, rows.shape[1])
        chosen = None if context.attention == "dense" else index.select(visible, self.config)
        mass: EntryMass | None
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
            )
            out = self.values(latents)
        else:
            key, value = self.expand(rows)
            mask = None if context.documents is None else context.documents.causal_mask()
            if chosen is not None:
                mask = chosen_mask(chosen, rows.shape[1])
            out = self.attend_per_head(query, key, value, mask)
            mass = _MassPerHead(query * self.scale, key, visible, chosen)
        aux = context.aux
        if aux is not None and mass is not None:
            aux.losses["indexer_kl"][self.layer] = indexer_kl(*index, mass, *_without_padding(visible, chosen, context))
            if aux.measure_selection:
                teacher = _MassPerHead(query * self.scale, self.expand(rows)[0], visible)
                measure_selection(aux, self.layer, teacher, index, visible, self.config)
        return out

    def gathers(self, tokens: int, chosen: int) -> bool:
        """Return whether to attend to ``chosen`` gathered latents instead of the masked keys of all ``tokens``.

        Multiply-adds per query and head are ``chosen * (2 * kv_lora_rank + qk_rope_head_dim)`` for gathered latents,
        which all heads share, and ``tokens * (qk_nope_head_dim + qk_rope_head_dim + v_head_dim)`` for the keys and
        values of every head. Gathering costs as much as :data:`GATHER_COST` more heads. At V3.2's sizes, latents are
        gathered from 7,834 tokens on.
        """
        sizes, heads = self.sizes(self.config), self.config.num_heads
        gathered = chosen * (2 * sizes.kv_lora_rank + sizes.qk_rope_head_dim) * (heads + GATHER_COST)
        return gathered < tokens * (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim + sizes.v_head_dim) * heads

    def select(self, projected: Projected, context: Context, cache: LayerCache) -> EntrySet:
        assert projected.indexed is not None
        query, keys, weights = projected.indexed
        cache.index.append(keys)
        chosen = select_stored(self, query, weights, cache.index, context.positions + 1, context)
        return EntrySet(cache.latents.pages, chosen=chosen)


class _MassPerHead:
    """The attention mass of tokens with a key per head, of all visible tokens or of the chosen ones.

    Takes scaled queries [B, S, H, c] and keys [B, S, H, c].
    """

    def __init__(self, query: Tensor, key: Tensor, visible: EntryRanges, chosen: Tensor | None = None):
        self._query, self._key = (cast(x.detach(), key.dtype).transpose(1, 2) for x in (query, key))
        self._visible, self._chosen = visible, chosen

    @torch.no_grad()
    def of(self, queries: slice = _EVERY) -> Tensor:
        S = self._query.shape[2]
        begin, end, _ = queries.indices(S)
        chosen = self._chosen
        pieces = []
        for start in range(begin, end, _QUERIES):
            stop = min(start + _QUERIES, end)
            own = slice(start, stop)
            seen = self._visible.of(own).mask(stop) if chosen is None else chosen_mask(chosen[:, own], S)[..., :stop]
            logits = (self._query[:, :, own] @ self._key[:, :, :stop].transpose(2, 3)).float()
            mass = logits.masked_fill_(~seen.unsqueeze(1), float("-inf")).softmax(-1).sum(1)
            if chosen is None:
                mass = F.pad(mass, (0, S - stop))
            else:
                unused = chosen[:, own] < 0
                mass = mass.gather(-1, chosen[:, own].clamp(min=0)).masked_fill(unused, 0.0)
            pieces.append(mass)
        return torch.cat(pieces, dim=1)


def _token_ranges(context: Context, tokens: int) -> EntryRanges:
    """Return the tokens that each query may attend to: those of its document, up to itself."""
    token = torch.arange(tokens, device=context.positions.device)
    return EntryRanges(token - context.positions, (token + 1).expand(context.positions.shape))


def _without_padding(
    visible: EntryRanges, chosen: Tensor | None, context: Context
) -> tuple[EntryRanges, Tensor | None]:
    """Return the ranges and the selection without those of padding tokens.

    A padding token attends to itself, but the mean of the indexer's loss must not count it.
    """
    if context.documents is None:
        return visible, chosen
    padding = ~context.documents.counted
    if chosen is not None:
        chosen = chosen.masked_fill(padding.unsqueeze(-1), -1)
    return EntryRanges(visible.first, visible.end - padding.long()), chosen
