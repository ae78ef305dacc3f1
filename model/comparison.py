"""A network's costs beside others': DeepSeek-V3.2, a BF16 GQA-8 model, and itself without each of the five choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from model.budget import (
    ParameterCount,
    Work,
    cache_bytes_per_token,
    decode_work,
    expert_weight_bytes,
    fixed_state_bytes,
)
from model.config import CACHE_FORMATS, ModelConfig
from model.precision import Precision

_FLOAT32 = 4
_GQA_HEADS, _GQA_HEAD_DIM = 8, 128
_FAR = 1 << 40
"""Tokens beyond which a crossing counts as never."""


@dataclass(frozen=True)
class Account:
    """Costs of one network as functions of the sequence's length. ``rule`` says what was counted.

    ``per_token`` and ``fixed`` are cache bytes of one sequence by component; ``work(n)`` decodes the n-th token.
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
        """FP8 FLOPs of equal cost (:data:`model.budget.FP8_EQUIVALENT`)."""
        return sum(work.equivalent for work in self.work(tokens))


def times(more: float, less: float) -> float | None:
    """``more / less``; None where ``less`` is zero, as the growing cache of a model with windows only."""
    return more / less if less else None


# --- the model and its references


def account_of(config: ModelConfig, name: str = "model") -> Account:
    return Account(
        name,
        "cache: packed entries with scales and padding, plus windows and the compressors' FP32 tails as fixed state; "
        "FLOPs: the released number formats, multi-token module idle",
        {part: size for part, size in cache_bytes_per_token(config).items() if size},
        {part: size for part, size in fixed_state_bytes(config).items() if size},
        lambda tokens: decode_work(config, tokens),
    )


def v32_account() -> Account:
    """DeepSeek-V3.2 as served in FP8: 61 layers of MLA under a lightning indexer (V3.2 report; shapes of V3).

    Decoding absorbs the latent's up-projection into query and output (BF16). Core attention reads 576 dims per key and
    sums 512, for 128 heads and at most 2,048 tokens. Per token and layer the cache holds 512 FP8 values, 4 FP32 scales
    and 64 BF16 rotary dims (656 bytes), and an FP8 index key of 128 dims with an FP32 scale (132 bytes).
    """
    layers, dense, d, heads = 61, 3, 7168, 128
    q_latent, kv_latent, rope, nope, value = 1536, 512, 64, 128, 128
    index_heads, index_dim, topk = 64, 128, 2048
    vocab, experts, expert_size, dense_size, active = 129_280, 256, 2048, 18_432, 8 + 1
    sparse = layers - dense
    projections = d * q_latent + q_latent * heads * (nope + rope) + d * (kv_latent + rope) + heads * value * d
    absorbed = kv_latent * heads * (nope + value)
    index_projections = q_latent * index_heads * index_dim + d * index_dim
    linears = [
        Work("attention projections", "linear", "fp8", 2.0 * layers * projections),
        Work("absorbed latent projections", "linear", "bf16", 2.0 * layers * absorbed),
        Work("index queries and keys", "linear", "fp8", 2.0 * layers * index_projections),
        Work("index head weights", "linear", "bf16", 2.0 * layers * d * index_heads),
        Work("router", "linear", "bf16", 2.0 * sparse * d * experts),
        Work("dense feed-forward", "linear", "fp8", 2.0 * dense * 3 * d * dense_size),
        Work("shared and routed experts", "linear", "fp8", 2.0 * sparse * active * 3 * d * expert_size),
        Work("head", "linear", "bf16", 2.0 * d * vocab),
    ]

    def work(tokens: int) -> list[Work]:
        core = 2.0 * layers * heads * (2 * kv_latent + rope) * min(tokens, topk)
        return [
            *linears,
            Work("index scores", "index", "fp8", 2.0 * layers * index_heads * index_dim * tokens),
            Work("core attention", "core", "bf16", core),
        ]

    main = kv_latent + 4 * _FLOAT32 + 2 * rope
    return Account(
        "V3.2 (MLA + DSA, FP8)",
        "61 layers at their published sizes; 656 bytes of latent, scales and rotary dims and 132 of FP8 index key per "
        "token and layer; index products FP8, core attention and absorbed projections BF16",
        {"main": float(layers * main), "index": float(layers * (index_dim + _FLOAT32))},
        {},
        work,
    )


def gqa8_account(config: ModelConfig) -> Account:
    """Grouped-query attention with 8 key-value heads of 128 dims, everything in BF16, at the model's depth.

    It keeps the model's hidden width, query heads (a multiple of 8), feed-forward and head; residuals are plain.
    """
    standard = with_gqa8(config).replace(hyper_connections=False, qat=False)
    account = account_of(standard)
    return dataclasses.replace(
        account,
        name="GQA-8 (BF16)",
        rule=f"{config.num_layers} layers, {standard.num_heads} query and 8 key-value heads of 128: 4,096 bytes per "
        "token and layer; the model's width, feed-forward and head, plain residuals; every product BF16",
        work=lambda tokens: [dataclasses.replace(work, format="bf16") for work in account.work(tokens)],
    )


def with_gqa8(config: ModelConfig) -> ModelConfig:
    """The network with 8 key-value heads of 128 dims in BF16 in every layer; the rest as it was."""
    return config.replace(
        layers=("gqa",) * config.num_layers,
        **dict.fromkeys(CACHE_FORMATS, "bf16"),
        num_heads=-(-config.num_heads // _GQA_HEADS) * _GQA_HEADS,
        num_kv_heads=_GQA_HEADS,
        head_dim=_GQA_HEAD_DIM,
        rope_head_dim=min(config.rope_head_dim, _GQA_HEAD_DIM // 2),
        o_groups=1,
    )


# --- the five choices, taken away in turn


@dataclass(frozen=True)
class Change:
    """Something other than cache and FLOPs that a choice moves; ``rule`` says how it is counted."""

    what: str
    unit: str
    with_choice: float
    without: float
    rule: str


@dataclass(frozen=True)
class Choice:
    """One of the five choices: the network without it, and what else it changes."""

    name: str
    taken_away: str
    used: bool
    account: Account
    changes: tuple[Change, ...] = ()


def choices(
    config: ModelConfig, parameters: ParameterCount, muon_parameters: int, muon: bool = True
) -> tuple[Choice, ...]:
    """Every choice of the recipe, each with the account of ``config`` without it.

    ``muon_parameters``: how many of all trained parameters (multi-token module included) Muon moves; ``muon``: whether
    the recipe uses it. A choice that the model does not make is not ``used``, and its account is the model's own.
    """
    hybrid = any(name != "gqa" for name in config.layers)
    roles = {"kv_format": hybrid, "index_format": "csa" in config.layers, "gqa_format": "gqa" in config.layers}
    packed = [role for role, used in roles.items() if used and getattr(config, role) in ("fp8", "fp4")]
    own = account_of(config)
    experts = parameters.components.get("routed experts", (0, 0))[0]
    all_parameters = parameters.total + parameters.mtp
    hc = parameters.components.get("hyper-connections", (0, 0))[0]
    momentum = Change(
        "optimizer state",
        "bytes",
        float(_FLOAT32 * muon_parameters + 2 * _FLOAT32 * (all_parameters - muon_parameters)),
        float(2 * _FLOAT32 * all_parameters),
        "FP32 moments of all trained parameters, multi-token module included: one (4 bytes) under Muon, two (8 bytes) "
        "under AdamW; weights and gradients not counted",
    )
    streams = (
        Change(
            "residual stream",
            "bytes per token",
            float(_FLOAT32 * config.hc_mult * config.hidden_size),
            float(_FLOAT32 * config.hidden_size),
            "FP32 state between two blocks, per token in flight",
        ),
        Change(
            "parameters",
            "numbers",
            float(parameters.total),
            float(parameters.total - hc),
            "main model, as counted above",
        ),
    )
    quantised = [
        Change(
            "routed experts' weights",
            "bytes",
            expert_weight_bytes(experts, qat=True),
            expert_weight_bytes(experts, qat=False),
            "E2M1 with an E8M0 scale per 32; without training for it FP8 E4M3 with a scale per 128 x 128; main model",
        )
    ]
    if "csa" in config.layers and config.index_format == "fp4":
        wider = config.index_head_dim + _FLOAT32 - Precision(config).index_layout.nbytes
        quantised.append(
            Change(
                "cache, if index keys must then stay FP8",
                "bytes per token",
                own.bytes_per_token,
                own.bytes_per_token + config.layers.count("csa") * wider / config.csa_ratio,
                "FP8 index key: one byte per dim and an FP32 scale; the switch alone leaves the format as it is",
            )
        )

    def without(used: bool, **changes: object) -> Account:
        return account_of(config.replace(**changes)) if used else own

    return (
        Choice(
            "hybrid attention",
            "GQA-8 in every layer, BF16 keys and values",
            hybrid,
            account_of(with_gqa8(config)) if hybrid else own,
        ),
        Choice(
            "precision per role",
            "what the cache packs, and index products, in BF16 (model.kv_format, index_format and gqa_format bf16)",
            bool(packed),
            without(bool(packed), **dict.fromkeys(packed, "bf16")),
        ),
        Choice("Muon", "AdamW (train.optimizer.rule adamw)", muon, own, (momentum,) if muon else ()),
        Choice(
            "hyper-connections",
            "one residual stream (model.hyper_connections false)",
            config.hyper_connections,
            without(config.hyper_connections, hyper_connections=False),
            streams if config.hyper_connections else (),
        ),
        Choice(
            "FP4 quantisation-aware training",
            "experts in FP8 (model.qat false)",
            config.qat,
            without(config.qat, qat=False),
            tuple(quantised) if config.qat and experts else (),
        ),
    )


# --- the waterfall


@dataclass(frozen=True)
class Step:
    """One stage of the waterfall: growing cache bytes per token after it, and by what it divided them."""

    name: str
    bytes_per_token: float
    factor: float | None
    rule: str


def waterfall(config: ModelConfig, muon: bool = True) -> tuple[Step, ...]:
    """From GQA-8 in BF16 to ``config``, one change at a time: the factors multiply to the whole ratio.

    Each stage's bytes come from the stage's own entry sizes, and the last stage's are those of the cache. Muon,
    hyper-connections and quantisation-aware training, where used, leave every entry as it is: their factor is 1.
    """
    plain = config.replace(**dict.fromkeys(CACHE_FORMATS, "bf16"))
    main, index = Precision(plain).main_layout.nbytes, Precision(plain).index_layout.nbytes
    packed_main, packed_index = Precision(config).main_layout.nbytes, Precision(config).index_layout.nbytes
    count = {name: config.layers.count(name) for name in ("sliding", "csa", "hca", "gqa")}
    kept = cache_bytes_per_token(plain)["gqa"]
    entries = count["csa"] / config.csa_ratio + count["hca"] / config.hca_ratio
    keys = count["csa"] / config.csa_ratio
    shared = config.num_layers - count["gqa"]
    stages: list[tuple[str, float, str]] = [
        (
            "GQA-8, BF16",
            4.0 * _GQA_HEADS * _GQA_HEAD_DIM * config.num_layers,
            f"{config.num_layers} layers x 2 x 8 heads x 128 dims x 2 bytes",
        )
    ]
    if count["gqa"]:
        stages.append(
            (
                "the model's own gqa layers",
                kept + shared * stages[0][1] / config.num_layers,
                f"{count['gqa']} layers x 2 x {config.num_kv_heads} heads x {config.head_dim} dims x 2 bytes",
            )
        )
    if shared:
        stages += [
            (
                "one head whose key is its value",
                kept + shared * main,
                f"{shared} layers x {config.head_dim} dims x 2 bytes, every token",
            ),
            (
                "windows: sliding layers forget",
                kept + (shared - count["sliding"]) * main,
                f"{count['sliding']} layers keep {config.window} tokens, which is fixed state",
            ),
            (
                "compression: csa and hca",
                kept + entries * main,
                f"{count['csa']} layers at 1/{config.csa_ratio}, {count['hca']} at 1/{config.hca_ratio}",
            ),
            (
                "index keys, BF16",
                kept + entries * main + keys * index,
                f"{count['csa']} layers x {config.index_head_dim} dims x 2 bytes at 1/{config.csa_ratio}",
            ),
            (
                f"entries in {_formats(config, 'kv_format', 'rope_format')}",
                kept + entries * packed_main + keys * index,
                f"{packed_main} bytes per entry of {config.head_dim} dims, scales and padding included",
            ),
            (
                f"index keys in {_formats(config, 'index_format')}",
                kept + entries * packed_main + keys * packed_index,
                f"{packed_index} bytes per key of {config.index_head_dim} dims, scales included",
            ),
        ]
    total = sum(cache_bytes_per_token(config).values())
    if count["gqa"] and config.gqa_format != "bf16":
        rule = f"{Precision(config).gqa_layout.nbytes} bytes per token and layer, scales included"
        stages.append((f"gqa keys and values in {_formats(config, 'gqa_format')}", total, rule))
    if muon:
        stages.append(("Muon", total, "optimizer state only"))
    if config.hyper_connections:
        stages.append(("hyper-connections", total, "residual streams, parameters and FLOPs only"))
    if config.qat:
        rule = "experts' weights; permits FP4 index keys, which are counted above"
        stages.append(("FP4 quantisation-aware training", total, rule))
    steps = [Step(stages[0][0], stages[0][1], None, stages[0][2])]
    for name, size, rule in stages[1:]:
        steps.append(Step(name, size, times(steps[-1].bytes_per_token, size), rule))
    return tuple(steps)


def _formats(config: ModelConfig, *roles: str) -> str:
    return " and ".join(dict.fromkeys(getattr(config, role).upper() for role in roles))


# --- where the regimes part


@dataclass(frozen=True)
class Regime:
    """The sequence length from which on one cost is at least another, for good; in raw FLOPs and in FP8 equivalents.

    None: not within 2^40 tokens. ``key`` names the crossing for programs, ``rule`` what is set against what.
    """

    key: str
    name: str
    tokens: int | None
    tokens_equivalent: int | None
    rule: str


Cost = Callable[[int, bool], float]
"""A cost at a length, raw (False) or weighted (True)."""


def regimes(config: ModelConfig, references: tuple[Account, ...] = ()) -> tuple[Regime, ...]:
    """All crossings that the model's layers allow, found from the closed forms to a cache page's tokens."""
    own = account_of(config)
    found: list[Regime] = []

    def crossing(key: str, name: str, rule: str, rising: Cost, passed: Cost, step: int = config.page_tokens) -> None:
        raw = _from_then_on(lambda n: rising(n, False) >= passed(n, False), step)
        weighted = _from_then_on(lambda n: rising(n, True) >= passed(n, True), step)
        found.append(Regime(key, name, raw, weighted, rule))

    if own.fixed and own.per_token:
        rule = "packed entries against windows and tails, in bytes"
        growing, fixed = own.bytes_per_token, float(sum(own.fixed.values()))
        crossing("fixed", "growing cache passes the fixed state", rule, lambda n, _: growing * n, lambda *_: fixed, 1)
    if "csa" in config.layers:
        first = (config.index_topk + 1) * config.csa_ratio
        found.append(Regime("topk", "csa begins to choose", first, first, "index_topk + 1 entries of csa_ratio tokens"))
        if "hca" in config.layers:
            coarse, fine = _part(own, "core attention, hca"), _part(own, "core attention, csa")
            crossing("hca", "core attention of hca passes that of csa", "both in the same format", coarse, fine)
        rule = "scores of all csa layers against core attention of all layers"
        crossing("index", "index scores pass core attention", rule, _kinds(own, "index"), _kinds(own, "core"))
    rule = "index scores and core attention against all other work"
    attention, others = ("index", "core"), ("linear", "residual")
    crossing("attention", "attention passes everything else", rule, _kinds(own, *attention), _kinds(own, *others))
    for other in references:
        rule = f"{other.name}: index scores against core attention"
        if any(work.kind == "index" for work in other.work(1)):
            rising, passed = _kinds(other, "index"), _kinds(other, "core")
            crossing(
                f"{other.name}: index", f"index scores of {other.name} pass its core attention", rule, rising, passed
            )
        rule = f"whole decode step against that of {other.name}"
        kinds = _kinds(other, *attention, *others), _kinds(own, *attention, *others)
        crossing(f"{other.name}: decode", f"decoding is no dearer than with {other.name}", rule, *kinds)
        rule = f"whole sequence, fixed state included, against that of {other.name}"
        sizes = _cache(other), _cache(own)
        crossing(f"{other.name}: cache", f"the cache is no larger than with {other.name}", rule, *sizes, 1)
    return tuple(found)


def _part(account: Account, part: str) -> Cost:
    return lambda tokens, _: sum(work.flops for work in account.work(tokens) if work.part == part)


def _kinds(account: Account, *kinds: str) -> Cost:
    def cost(tokens: int, weighted: bool) -> float:
        return sum(work.equivalent if weighted else work.flops for work in account.work(tokens) if work.kind in kinds)

    return cost


def _cache(account: Account) -> Cost:
    return lambda tokens, _: account.cache_bytes(tokens)


def _from_then_on(holds: Callable[[int], bool], step: int) -> int | None:
    """The least multiple of ``step`` from which on ``holds``, judged at powers of two and bisected between two of them;
    1 where it holds at every one."""
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
