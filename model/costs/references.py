"""Costs of a network and of its references: DeepSeek-V3.2 and a BF16 model with grouped-query attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from model.config import CACHE_FORMATS, ModelConfig
from model.costs.cache import cache_bytes_per_token, fixed_state_bytes
from model.costs.flops import decode_work
from model.wording import count
from model.work import Work

FLOAT32_BYTES = 4
GQA_HEADS, GQA_HEAD_DIM = 8, 128


@dataclass(frozen=True)
class CostModel:
    """Costs of one network as functions of the sequence length. ``rule`` is the counting rule, for printing.

    ``per_token`` and ``fixed`` are cache bytes of one sequence by component. ``work(n)`` is the work of the n-th token.
    """

    name: str
    rule: str
    per_token: dict[str, float]
    fixed: dict[str, int]
    work: Callable[[int], list[Work]]

    @property
    def bytes_per_token(self) -> float:
        """Growing cache bytes per token."""
        return sum(self.per_token.values())

    def cache_bytes(self, tokens: int) -> float:
        """Cache bytes of one sequence of ``tokens`` tokens, fixed state included."""
        return self.bytes_per_token * tokens + sum(self.fixed.values())

    def flops(self, tokens: int) -> float:
        return sum(work.flops for work in self.work(tokens))

    def equivalent(self, tokens: int) -> float:
        """FP8 FLOPs of equal cost (:data:`model.work.FP8_EQUIVALENT`)."""
        return sum(work.equivalent for work in self.work(tokens))

    def equals(self, other: CostModel, tokens: int) -> bool:
        """Return whether both networks have the same cache and the same work after ``tokens`` tokens."""
        return (self.per_token, self.fixed, self.work(tokens)) == (other.per_token, other.fixed, other.work(tokens))


def times(more: float, less: float) -> float | None:
    """Return ``more / less``, or None if ``less`` is zero. The growing cache of a model with windows only is zero."""
    return more / less if less else None


def costs_of(config: ModelConfig, name: str = "model") -> CostModel:
    return CostModel(
        name,
        "cache: packed entries with scales and padding, plus windows, the compressors' FP32 tails and recurrent states "
        "as fixed state; FLOPs: the released number formats, multi-token module idle",
        {part: size for part, size in cache_bytes_per_token(config).items() if size},
        {part: size for part, size in fixed_state_bytes(config).items() if size},
        lambda tokens: decode_work(config, tokens),
    )


def v32_costs() -> CostModel:
    """Return the costs of DeepSeek-V3.2, preset ``v3.2``, served in FP8.

    Decoding absorbs the latent's up-projection into query and output (BF16). Core attention reads 576 dims per key and
    sums 512, for 128 heads and at most 2,048 tokens. Per token and layer the cache holds a latent of 656 bytes and an
    index key of 132.
    """
    return dataclasses.replace(
        costs_of(ModelConfig.from_preset("v3.2")),
        name="V3.2 (MLA + DSA, FP8)",
        rule="61 layers at their published sizes; 656 bytes of latent, scales and rotary dims and 132 of FP8 index key "
        "per token and layer; index products FP8, core attention and absorbed projections BF16",
    )


def gqa8_costs(config: ModelConfig) -> CostModel:
    """Return the costs of grouped-query attention with 8 key-value heads of 128 dims in BF16, at the model's depth.

    The model's hidden width, query heads (rounded to a multiple of 8), feed-forward and head are kept, with plain
    residuals.
    """
    standard = with_gqa8(config).replace(hyper_connections=False, qat=False)
    costs = costs_of(standard)
    return dataclasses.replace(
        costs,
        name="GQA-8 (BF16)",
        rule=f"{count(config.num_layers, 'layer')}, {standard.num_heads} query and 8 key-value heads of 128: 4,096 "
        "bytes per token and layer; the model's width, feed-forward and head, plain residuals; every product BF16",
        work=lambda tokens: [dataclasses.replace(work, format="bf16") for work in costs.work(tokens)],
    )


def with_gqa8(config: ModelConfig) -> ModelConfig:
    """Return the configuration with 8 key-value heads of 128 dims in BF16 in every layer."""
    return config.replace(
        layers=("gqa",) * config.num_layers,
        **dict.fromkeys(CACHE_FORMATS, "bf16"),
        num_heads=-(-config.num_heads // GQA_HEADS) * GQA_HEADS,
        num_kv_heads=GQA_HEADS,
        head_dim=GQA_HEAD_DIM,
        rope_head_dim=min(config.rope_head_dim, GQA_HEAD_DIM // 2),
        o_groups=1,
    )
