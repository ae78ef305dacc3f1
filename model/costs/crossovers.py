"""Crossovers: sequence lengths at which one cost overtakes another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from model.config import ModelConfig
from model.costs.references import CostModel, costs_of
from model.mixers.base import Mixer
from model.mixers.csa import CompressedSparseAttention
from model.mixers.hca import HeavilyCompressedAttention

_FAR = 1 << 40
"""Tokens beyond which a crossover counts as never."""


@dataclass(frozen=True)
class Crossover:
    """Sequence length from which on one cost is at least another, in raw FLOPs and in FP8 equivalents.

    None stands for more than 2^40 tokens. ``key`` identifies the crossover. ``rule`` defines the terms of ``name``;
    crossovers with the same terms share it.
    """

    key: str
    name: str
    tokens: int | None
    tokens_equivalent: int | None
    rule: str


Cost = Callable[[int, bool], float]
"""A cost at a sequence length, in raw (False) or weighted (True) FLOPs."""


def find_crossovers(config: ModelConfig, references: tuple[CostModel, ...] = ()) -> tuple[Crossover, ...]:
    """Return all crossovers that apply to the model's layers, to the resolution of a cache page."""
    own = costs_of(config)
    found: list[Crossover] = []

    def crossing(key: str, name: str, rule: str, rising: Cost, passed: Cost, step: int = config.page_tokens) -> None:
        raw = _find_last_crossing(lambda n: rising(n, False) >= passed(n, False), step)
        weighted = _find_last_crossing(lambda n: rising(n, True) >= passed(n, True), step)
        found.append(Crossover(key, name, raw, weighted, rule))

    if own.fixed and own.per_token:
        rule = "growing cache: packed entries; fixed state: windows, tails and recurrent states; both in bytes"
        growing, fixed = own.bytes_per_token, float(sum(own.fixed.values()))
        crossing("fixed", "growing cache passes the fixed state", rule, lambda n, _: growing * n, lambda *_: fixed, 1)
    indexed = list(dict.fromkeys(config.mixers[layer] for layer in config.indexed_layers))
    for mixer in indexed:
        ratio = mixer.indexer_ratio(config)
        assert ratio is not None
        first = (config.index_topk + 1) * ratio
        key = "topk" if mixer is indexed[0] else f"topk {mixer.name}"
        rule = f"{mixer.name} chooses from index_topk + 1 entries of {ratio} token{'s' * (ratio > 1)} on"
        found.append(Crossover(key, f"{mixer.name} begins to choose", first, first, rule))
    if {CompressedSparseAttention, HeavilyCompressedAttention} <= set(config.mixers):
        coarse, fine = _part(own, HeavilyCompressedAttention), _part(own, CompressedSparseAttention)
        rule = "core attention of hca and of csa: both in the same format"
        crossing("hca", "core attention of hca passes that of csa", rule, coarse, fine)
    sums = "index scores and core attention: sums over the layers of one network"
    if indexed:
        crossing("index", "index scores pass core attention", sums, _kinds(own, "index"), _kinds(own, "core"))
    rule = "attention: index scores and core attention; everything else: all other work of the step"
    attention, others = ("index", "core"), ("linear", "residual")
    crossing("attention", "attention passes everything else", rule, _kinds(own, *attention), _kinds(own, *others))
    for other in references:
        if any(work.kind == "index" for work in other.work(1)):
            rising, passed = _kinds(other, "index"), _kinds(other, "core")
            crossing(
                f"{other.name}: index", f"index scores of {other.name} pass its core attention", sums, rising, passed
            )
        rule = "decoding: all work of the step"
        kinds = _kinds(other, *attention, *others), _kinds(own, *attention, *others)
        crossing(f"{other.name}: decode", f"decoding costs no more than with {other.name}", rule, *kinds)
        rule = "cache: of one sequence, fixed state included"
        sizes = _cache(other), _cache(own)
        crossing(f"{other.name}: cache", f"the cache is no larger than with {other.name}", rule, *sizes, 1)
    return tuple(found)


def _part(costs: CostModel, mixer: type[Mixer]) -> Cost:
    part = f"core attention, {mixer.name}"
    return lambda tokens, _: sum(work.flops for work in costs.work(tokens) if work.part == part)


def _kinds(costs: CostModel, *kinds: str) -> Cost:
    def cost(tokens: int, weighted: bool) -> float:
        return sum(work.equivalent if weighted else work.flops for work in costs.work(tokens) if work.kind in kinds)

    return cost


def _cache(costs: CostModel) -> Cost:
    return lambda tokens, _: costs.cache_bytes(tokens)


def _find_last_crossing(holds: Callable[[int], bool], step: int) -> int | None:
    """Return the smallest multiple of ``step`` from which on ``holds`` is true, or None beyond 2^40 tokens.

    Tests ``step`` times powers of two and bisects after the last one where ``holds`` is false. Returns 1 if there is
    none."""
    powers = [1 << i for i in range(_FAR.bit_length()) if step << i <= _FAR]
    last_without = max((i for i, n in enumerate(powers) if not holds(n * step)), default=-1)
    if last_without == -1:
        return 1
    if last_without == len(powers) - 1:
        return None
    low, high = powers[last_without], powers[last_without + 1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle * step) else (middle, high)
    return high * step
