"""Multi-head latent attention (DeepSeek-V2 report 2.1, DeepSeek-V3, Kimi Linear).

Keys and values of all heads are projections of one latent per token. A rotary key, shared by all heads, carries the
position. The cache holds the latent and the rotary key, concatenated. Attention over the cache is absorbed: the key
projection moves to the query and the value projection to the output, so that all heads attend to the latents
themselves. Whole sequences are attended to with the keys and values of every head, which are narrower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.autocast import cast, product_dtype
from kernels.cache_io import FORMAT_BITS, EntryLayout
from kernels.linear import grouped_linear
from kernels.paged_attention import EntrySet, paged_attention
from model.cache.parts import CachePart, GrowingPart
from model.forward.context import Context
from model.forward.execution import in_tiles
from model.layers.linear import Linear
from model.layers.norm import RMSNorm
from model.layers.rope import Rotary, Rotation
from model.mixers.base import Mixer, StoredFormat, require, yarn_of
from model.mixers.batch_invariant import invariant_attention
from model.mixers.indexer import IndexInputs
from model.mixers.options import check_count, check_flag, check_number
from model.wording import quote
from model.work import Work

if TYPE_CHECKING:
    from model.cache.layer_cache import LayerCache
    from model.config import ModelConfig

LATENT_NORM_EPS = 1e-6
"""The released code of DeepSeek-V3.2 and Kimi Linear does not take it from the configuration."""


class Projected(NamedTuple):
    """Inputs of the attention."""

    query: Tensor
    """float32 [B, S, H, qk_nope_head_dim + qk_rope_head_dim]; absorbed, [B, S, H, kv_lora_rank + qk_rope_head_dim]."""
    rows: Tensor
    """float32 [B, S, kv_lora_rank + qk_rope_head_dim]: latents concatenated with rotary keys, as stored."""
    indexed: IndexInputs | None = None
    """Inputs of the selection of dsa layers."""


_ROPE_DIMS = "expected an even number of at least 2, or 0 without rope"


class Sizes(NamedTuple):
    """The options of the mixer (names as in transformers)."""

    q_lora_rank: int | None
    """Width of the queries' latent. None projects queries directly."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    """Dims of a query and key head without position."""
    qk_rope_head_dim: int
    """Dims of a query and key head with position."""
    v_head_dim: int
    mscale: float
    """YaRN scales the rotary dims by ``m(mscale) / m(mscale_all_dim)`` and all logits by ``m(mscale_all_dim) ** 2``,
    where ``m(x) = 0.1 * x * ln(yarn_factor) + 1``. Without either (0), it scales the rotary dims by ``m(1)``."""
    mscale_all_dim: float
    rope: bool = True
    """False leaves the dims with position unrotated (NoPE, as in Kimi Linear)."""


class MultiHeadLatentAttention(Mixer):
    """Attention of every query to all past tokens."""

    name = "mla"
    options: ClassVar[dict[str, Any]] = {
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "rope": True,
    }
    formats: ClassVar[tuple[str, ...]] = ("kv_format", "rope_format")
    batch_invariant_widths: ClassVar[tuple[str, ...]] = (
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    )

    direct_queries: ClassVar[bool] = True
    """True if the queries' latent is optional."""

    # --- declarations

    @classmethod
    def sizes(cls, config: ModelConfig) -> Sizes:
        return Sizes(**config.mixer_options[cls.name])

    @classmethod
    def layout(cls, config: ModelConfig) -> EntryLayout:
        """Return the layout of a token's latent and rotary key."""
        sizes = cls.sizes(config)
        return EntryLayout(sizes.kv_lora_rank, config.kv_format, sizes.qk_rope_head_dim, config.rope_format)

    @classmethod
    def check_options(cls, options: Mapping[str, Any], key: str) -> None:
        sizes = Sizes(**options)
        check_flag(f"{key}.rope", sizes.rope)
        check_count(f"{key}.q_lora_rank", sizes.q_lora_rank, optional=cls.direct_queries)
        for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            check_count(f"{key}.{name}", getattr(sizes, name))
        rope_dims = sizes.qk_rope_head_dim
        require(
            type(rope_dims) is int and 0 <= rope_dims < 1 << 31 and rope_dims % 2 == 0,
            f"{_ROPE_DIMS}, found {quote(rope_dims)}",
            f"{key}.qk_rope_head_dim",
        )
        for name in ("mscale", "mscale_all_dim"):
            check_number(f"{key}.{name}", getattr(sizes, name))

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        sizes, key = cls.sizes(config), f"mixer_options.{cls.name}"
        require(
            sizes.qk_rope_head_dim > 0 or not sizes.rope,
            f"{_ROPE_DIMS}, found 0",
            f"{key}.qk_rope_head_dim",
        )
        bits = FORMAT_BITS[config.kv_format]
        unit = FORMAT_BITS[config.rope_format] if sizes.qk_rope_head_dim else 8
        require(
            sizes.kv_lora_rank * bits % unit == 0,
            f"{sizes.kv_lora_rank} dims in kv_format {config.kv_format} end within a value of "
            f"rope_format {config.rope_format}; expected a multiple of {unit // bits}",
            f"{key}.kv_lora_rank",
        )

    @classmethod
    def rotary(cls, config: ModelConfig) -> Rotary | None:
        sizes = cls.sizes(config)
        if not sizes.rope:
            return None
        factor = _mscale(config, 1.0)
        if sizes.mscale and sizes.mscale_all_dim:
            factor = _mscale(config, sizes.mscale) / _mscale(config, sizes.mscale_all_dim)
        return Rotary(sizes.qk_rope_head_dim, config.rope_theta, yarn_of(config, factor))

    @classmethod
    def softmax_scale(cls, config: ModelConfig) -> float:
        sizes = cls.sizes(config)
        scale = (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim) ** -0.5
        return scale * _mscale(config, sizes.mscale_all_dim) ** 2 if sizes.rope else scale

    @classmethod
    def steps_have_fixed_shape(cls, config: ModelConfig, device: str) -> bool:
        return True

    @classmethod
    def cache_parts(cls, config: ModelConfig) -> dict[str, CachePart]:
        return {"latents": GrowingPart(cls.layout(config), 1, cls.name)}

    @classmethod
    def stored_formats(cls, config: ModelConfig) -> list[StoredFormat]:
        keys = [StoredFormat("shared rotary keys", config.rope_format, 1)] * (cls.sizes(config).qk_rope_head_dim > 0)
        return [StoredFormat("latents of keys and values", config.kv_format, 1), *keys]

    @classmethod
    def work(cls, config: ModelConfig, tokens: int) -> list[Work]:
        sizes, d, heads = cls.sizes(config), config.hidden_size, config.num_heads
        latent, rope = sizes.kv_lora_rank, sizes.qk_rope_head_dim
        queries = heads * (sizes.qk_nope_head_dim + rope)
        into_queries = d * queries if sizes.q_lora_rank is None else sizes.q_lora_rank * (d + queries)
        projections = into_queries + d * (latent + rope) + heads * sizes.v_head_dim * d
        absorbed = latent * heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
        core = heads * (2 * latent + rope) * cls.attended_tokens(config, tokens)
        return [
            Work("attention projections", "linear", "fp8", 2.0 * projections),
            Work("absorbed latent projections", "linear", "bf16", 2.0 * absorbed),
            Work(f"core attention, {cls.name}", "core", "bf16", 2.0 * core),
        ]

    @classmethod
    def attended_tokens(cls, config: ModelConfig, tokens: int) -> int:
        """Return the number of tokens that the ``tokens``-th token attends to."""
        return tokens

    # --- the layer

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        c, sizes = config, self.sizes(config)
        queries = c.num_heads * (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim)
        if sizes.q_lora_rank is None:
            self.wq = Linear(c.hidden_size, queries)
        else:
            self.wq_a = Linear(c.hidden_size, sizes.q_lora_rank)
            self.q_norm = RMSNorm(sizes.q_lora_rank, LATENT_NORM_EPS)
            self.wq_b = Linear(sizes.q_lora_rank, queries)
        self.wkv_a = Linear(c.hidden_size, sizes.kv_lora_rank + sizes.qk_rope_head_dim)
        self.kv_norm = RMSNorm(sizes.kv_lora_rank, LATENT_NORM_EPS)
        self.wkv_b = Linear(sizes.kv_lora_rank, c.num_heads * (sizes.qk_nope_head_dim + sizes.v_head_dim))
        self.wo = Linear(c.num_heads * sizes.v_head_dim, c.hidden_size)

    def set_config(self, config: ModelConfig) -> None:
        super().set_config(config)
        self.row_layout, self.scale = self.layout(config), self.softmax_scale(config)
        self.latent_dims, self.nope_dims = (
            getattr(self.sizes(config), n) for n in ("kv_lora_rank", "qk_nope_head_dim")
        )

    def zero_output(self) -> None:
        self.wo.weight.zero_()

    def split_sizes(self) -> dict[str, tuple[int, ...]]:
        sizes = self.sizes(self.config)
        # Rows of wkv_b are the keys and values of a head, then those of the next.
        found = {"wkv_b.weight": (sizes.qk_nope_head_dim, sizes.v_head_dim) * self.config.num_heads}
        if sizes.qk_rope_head_dim:
            found["wkv_a.weight"] = (sizes.kv_lora_rank, sizes.qk_rope_head_dim)
        return found

    def project(self, x: Tensor, rotation: Rotation | None, context: Context, cached: bool) -> Projected:
        narrow = cast(x, product_dtype(x))  # once for all products
        query = self.queries(narrow, self.query_latent(narrow), rotation)
        return Projected(self.absorb(query) if cached else query, self.project_rows(narrow, rotation, context))

    def query_latent(self, x: Tensor) -> Tensor | None:
        """Return the queries' latent [B, S, q_lora_rank], if they have one."""
        return None if self.sizes(self.config).q_lora_rank is None else self.q_norm(self.wq_a(x))

    def queries(self, x: Tensor, latent: Tensor | None, rotation: Rotation | None) -> Tensor:
        """Return rotated queries: float32 [B, S, H, qk_nope_head_dim + qk_rope_head_dim]."""
        query = self.wq(x) if latent is None else self.wq_b(latent)
        query = query.unflatten(-1, (self.config.num_heads, -1))
        return cast(query, torch.float32) if rotation is None else rotation.apply(query)

    def project_rows(self, x: Tensor, rotation: Rotation | None, context: Context) -> Tensor:
        """Return normalized latents concatenated with rotated keys, as stored: float32
        [B, S, kv_lora_rank + qk_rope_head_dim]."""
        row = self.wkv_a(x)
        latent, key = row[..., : self.latent_dims], row[..., self.latent_dims :]
        row = torch.cat((self.kv_norm(latent), cast(key, torch.float32)), dim=-1)
        row = row if rotation is None else rotation.apply(row)
        return self.precision.round_to(row, "mla", self.row_layout, self.training, context.aux)

    def absorb(self, query: Tensor) -> Tensor:
        """Multiply the position-free dims of queries [B, S, H, ...] by the key projections, for products with rows:
        float32 [B, S, H, kv_lora_rank + qk_rope_head_dim]."""
        keys, _ = self._key_and_value_weights()
        free = query[..., : self.nope_dims].flatten(0, 1).transpose(0, 1)  # [H, B * S, qk_nope_head_dim]
        latent = torch.bmm(cast(free, keys.dtype), keys).transpose(0, 1).unflatten(0, query.shape[:2])
        return torch.cat((cast(latent, torch.float32), query[..., self.nope_dims :]), dim=-1)

    def values(self, latents: Tensor) -> Tensor:
        """Multiply attended latents [B, S, H, kv_lora_rank] by the value projections: [B, S, H, v_head_dim]."""
        _, values = self._key_and_value_weights()
        return grouped_linear(latents.flatten(2), values).unflatten(-1, (len(values), -1))

    def _key_and_value_weights(self) -> tuple[Tensor, Tensor]:
        """Return every head's projections of a latent to its key and value, views [H, dims, kv_lora_rank]."""
        heads = self.wkv_b.weight.unflatten(0, (self.config.num_heads, -1))
        return heads[:, : self.nope_dims], heads[:, self.nope_dims :]

    def mix(self, projected: Projected, context: Context, cache: LayerCache | None) -> Tensor:
        """Return the attention's outputs, float32 [B, S, H, v_head_dim]."""
        if cache is None:
            return self.attend(projected, context)
        cache.latents.append(projected.rows)
        entries = self.select(projected, context, cache)
        settings = self.scale, self.latent_dims
        if context.batch_invariant:
            layout = self.row_layout
            latents = invariant_attention(projected.query, None, entries, None, layout, context, *settings)
            return in_tiles(self.values, latents)
        arguments = projected.query, None, entries, None, self.row_layout, 0, *settings
        latents = paged_attention(*arguments, weight_dtype=self.wkv_b.weight.dtype)
        return self.values(latents)

    def select(self, projected: Projected, context: Context, cache: LayerCache) -> EntrySet:
        """Return the rows of the cache that each query attends to."""
        return EntrySet(cache.latents.pages, visible=context.positions + 1)

    def attend(self, projected: Projected, context: Context) -> Tensor:
        """Attend within whole sequences, with the keys and values of every head."""
        mask = None if context.documents is None else context.documents.causal_mask()
        return self.attend_per_head(projected.query, *self.expand(projected.rows), mask)

    def expand(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return every head's keys [B, S, H, qk_nope_head_dim + qk_rope_head_dim] and values [B, S, H, v_head_dim]."""
        latent, shared_key = rows[..., : self.latent_dims], rows[..., self.latent_dims :]
        both = self.wkv_b(cast(latent, product_dtype(latent))).unflatten(-1, (self.config.num_heads, -1))
        shared_key = cast(shared_key, both.dtype).unsqueeze(2).expand(*both.shape[:3], -1)
        return torch.cat((both[..., : self.nope_dims], shared_key), dim=-1), both[..., self.nope_dims :]

    def attend_per_head(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with unabsorbed queries under a mask, bool [B, S, S], or to all past tokens: float32
        [B, S, H, v_head_dim]."""
        width = max(key.shape[-1], value.shape[-1])  # PyTorch's blockwise attention on a CPU needs equal widths
        query, padded_key, padded_value = (
            F.pad(cast(x, key.dtype), (0, width - x.shape[-1])).transpose(1, 2) for x in (query, key, value)
        )
        mask = None if mask is None else mask.unsqueeze(1)
        out = F.scaled_dot_product_attention(
            query, padded_key, padded_value, attn_mask=mask, is_causal=mask is None, scale=self.scale
        )
        return cast(out[..., : value.shape[-1]].transpose(1, 2), torch.float32)

    def output(self, mixed: Tensor, rotation: Rotation | None) -> Tensor:
        return self.wo(mixed.flatten(2))


def _mscale(config: ModelConfig, weight: float) -> float:
    """Return YaRN's length scaling ``m(weight)`` (:attr:`Sizes.mscale`)."""
    return 0.1 * weight * math.log(config.yarn_factor) + 1.0
