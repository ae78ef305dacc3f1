"""What a network costs: cache bytes, FLOPs per decoded token and parameters, in closed form or counted from tensors.

Cache rule: growing bytes per token are packed entries (scales and padding included) over the tokens they cover;
window, tails and page rounding are the fixed state, which does not grow with the sequence. :class:`model.cache.Cache`
must measure the same.

FLOP rule: one sequence decodes its n-th token with the released kernels' number formats, the multi-token module idle.
A multiply-add is two. Matrix products count, and the residual streams' mixing; norms, softmax, pooling, rotations,
rounding and the sum over index heads do not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from model.config import ModelConfig
from model.paging import growing_parts
from model.precision import EXPERT_FORMAT, Precision

_FLOAT32 = 4

FP8_EQUIVALENT = {"bf16": 2.0, "fp8": 1.0, "fp4 weights": 1.0, "fp4": 0.5}
"""FP8 FLOPs that take the time of one FLOP in each format. FP4 weights meet FP8 activations, which today's hardware
multiplies at FP8's peak (report 5.2.1); only the index products have FP4 on both sides. The report does not print its
weights: with these its ratios to V3.2 come out."""

WEIGHTING = (
    "equivalent FP8 FLOPs: BF16 x2, FP8 x1, FP4 index products x0.5, FP4 experts (FP8 activations) x1; "
    "core attention counts as BF16, and so does what runs in FP32 (head, router, compressors, hyper-connections)"
)

WorkKind = Literal["linear", "index", "core", "residual"]


@dataclass(frozen=True)
class Work:
    """One part of a decode step. ``format`` is what is multiplied, a key of :data:`FP8_EQUIVALENT`."""

    part: str
    kind: WorkKind
    format: str
    flops: float

    @property
    def equivalent(self) -> float:
        """FP8 FLOPs of equal cost."""
        return self.flops * FP8_EQUIVALENT[self.format]


# --- cache


def cache_bytes_per_token(config: ModelConfig) -> dict[str, float]:
    """Growing cache bytes per token, by component (``csa``, ``hca``, ``index``, ``gqa``), summed over layers."""
    per_token = dict.fromkeys(("csa", "hca", "index", "gqa"), 0.0)
    for part in growing_parts(config).values():
        per_token[part.component] += part.layout.nbytes / part.ratio
    return per_token


def fixed_state_bytes(config: ModelConfig, rewind: int = 0) -> dict[str, int]:
    """Bytes per sequence that do not grow: the sliding windows, and the compressors' tails in float32, both longer by
    the ``rewind`` tokens that a cache can always take back."""
    windowed = sum(name != "gqa" for name in config.layers)
    tail = 0
    for name in config.layers:
        if name == "csa":
            tail += (2 * config.csa_ratio - 1 + rewind) * 4 * (config.head_dim + config.index_head_dim) * _FLOAT32
        elif name == "hca":
            tail += (config.hca_ratio - 1 + rewind) * 2 * config.head_dim * _FLOAT32
    return {"window": windowed * (config.window + rewind) * Precision(config).main_layout.nbytes, "tail": tail}


def cache_bytes(config: ModelConfig, tokens: int) -> float:
    """Closed-form cache bytes of one sequence of ``tokens`` tokens, fixed state included, page rounding excluded."""
    return sum(cache_bytes_per_token(config).values()) * tokens + sum(fixed_state_bytes(config).values())


# --- FLOPs


def decode_work(config: ModelConfig, tokens: int) -> list[Work]:
    """What decoding one token costs once ``tokens`` tokens, itself included, are in the sequence; summed over layers.

    Parts that the schedule does not have are left out. Entries in reach follow the model's causality: the n-th token
    sees n // ratio of them, csa at most ``index_topk`` (report eq. 13-23).
    """
    work = _mixer_linears(config) + _attention(config, tokens) + _residual(config) + feed_forward_work(config)
    work.append(Work("head", "linear", "bf16", 2.0 * config.hidden_size * config.vocab_size))
    return [part for part in work if part.flops]


def _mixer_linears(c: ModelConfig) -> list[Work]:
    d, heads_width, latent = c.hidden_size, c.num_heads * c.head_dim, c.q_lora_rank
    csa, hca, gqa = (c.layers.count(name) for name in ("csa", "hca", "gqa"))
    latent_layers = c.num_layers - gqa
    projections = d * latent + latent * heads_width + d * c.head_dim + c.o_groups * c.o_lora_rank * d
    standard = 2 * d * heads_width + 2 * d * c.num_kv_heads * c.head_dim
    # The released code stores wo_a in FP8 and multiplies it in BF16.
    grouped = heads_width * c.o_lora_rank
    compressors = csa * 2 * d * 2 * c.head_dim + hca * 2 * d * c.head_dim
    index_keys = csa * 2 * d * 2 * c.index_head_dim
    index_queries = csa * latent * c.index_heads * c.index_head_dim
    return [
        Work("attention projections", "linear", "fp8", 2.0 * (latent_layers * projections + gqa * standard)),
        Work("grouped output projection", "linear", "bf16", 2.0 * latent_layers * grouped),
        Work("compressors", "linear", "bf16", 2.0 * compressors),
        Work("index queries", "linear", "fp8", 2.0 * index_queries),
        Work("index keys and head weights", "linear", "bf16", 2.0 * (index_keys + csa * d * c.index_heads)),
    ]


def _attention(c: ModelConfig, tokens: int) -> list[Work]:
    csa, hca, gqa = (c.layers.count(name) for name in ("csa", "hca", "gqa"))
    fine, coarse, window = tokens // c.csa_ratio, tokens // c.hca_ratio, min(tokens, c.window)
    per_key = 4.0 * c.num_heads * c.head_dim
    index_format = "bf16" if c.index_format == "fp32" else c.index_format
    return [
        Work("index scores", "index", index_format, 2.0 * csa * c.index_heads * c.index_head_dim * fine),
        Work("core attention, csa", "core", "bf16", csa * per_key * (min(c.index_topk, fine) + window)),
        Work("core attention, hca", "core", "bf16", hca * per_key * (coarse + window)),
        Work("core attention, sliding", "core", "bf16", c.layers.count("sliding") * per_key * window),
        Work("core attention, gqa", "core", "bf16", gqa * per_key * tokens),
    ]


def _residual(c: ModelConfig) -> list[Work]:
    if not c.hyper_connections:
        return []
    n, d, blocks = c.hc_mult, c.hidden_size, 2 * c.num_layers
    weights = blocks * (2 * n + n * n) * n * d + n * n * d  # around every block, and once before the head
    mixing = blocks * (n * n + 2 * n) * d + n * d
    return [
        Work("hyper-connections: weights", "residual", "bf16", 2.0 * weights),
        Work("hyper-connections: mixing", "residual", "bf16", 2.0 * mixing),
    ]


def feed_forward_work(config: ModelConfig) -> list[Work]:
    """The feed-forward part of :func:`decode_work`: router, shared and active routed experts, or the dense block."""
    c = config
    if c.ffn == "dense":
        return [Work("feed-forward", "linear", "fp8", 2.0 * c.num_layers * 3 * c.hidden_size * c.ffn_size)]
    expert = 2.0 * c.num_layers * 3 * c.hidden_size * c.expert_size
    return [
        Work("router", "linear", "bf16", 2.0 * c.num_layers * c.num_experts * c.hidden_size),
        Work("shared experts", "linear", "fp8", c.num_shared_experts * expert),
        Work("routed experts", "linear", "fp4 weights" if c.qat else "fp8", c.experts_per_token * expert),
    ]


# --- parameters

PARAMETER_RULE = (
    "trained tensors of the main model, embedding and head included; the multi-token module stands apart, and router "
    "biases (moved by rule) and hash-routing tables (fixed integers) are not counted. Active: what one token is "
    "multiplied with, so all but the embedding (a look-up) and the routed experts it is not sent to; the head is active"
)

_COMPONENTS = (
    ("multi-token module", r"^mtp\."),
    ("embedding", r"^embed\."),
    ("head", r"^head\."),
    ("hyper-connections", r"_residual\.|^hyper_head\."),
    ("norms", r"^norm\.|^layers\.\d+\.(attn|ffn)_norm\."),
    ("indexers", r"\.indexer\."),
    ("compressors", r"\.compressor\."),
    ("attention", r"\.attn\."),
    ("router", r"\.ffn\.router\."),
    ("shared experts", r"\.ffn\.shared\."),
    ("routed experts", r"\.ffn\.w[123]$"),
    ("feed-forward", r"\.ffn\."),
)


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters by :data:`PARAMETER_RULE`. ``components`` maps a name to (all, active per token)."""

    components: dict[str, tuple[int, int]]
    mtp: int

    @property
    def total(self) -> int:
        return sum(total for total, _ in self.components.values())

    @property
    def active(self) -> int:
        return sum(active for _, active in self.components.values())


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the tensors of a :class:`model.transformer.Transformer`, which may live on the meta device.

    By :data:`PARAMETER_RULE` Flash has 284.33B, 13.27B active, and Pro 1.573T, 48.85B active, which round to the
    published 284B / 13B and 1.6T / 49B. Flash's figure leaves no room for the multi-token module (6.61B) and none for
    dropping the embedding (0.53B) from the total; Pro's rounds to 1.6T with its module (25.84B) as well.
    """
    config: ModelConfig = model.config  # type: ignore[assignment]
    components: dict[str, tuple[int, int]] = {}
    mtp = 0
    for name, parameter in model.named_parameters():
        component = next(title for title, pattern in _COMPONENTS if re.search(pattern, name))
        numbers = active = parameter.numel()
        if component == "multi-token module":
            mtp += numbers
            continue
        if component == "embedding":
            active = 0
        elif component == "routed experts":
            active = numbers // config.num_experts * config.experts_per_token
        total, active_total = components.get(component, (0, 0))
        components[component] = total + numbers, active_total + active
    return ParameterCount(components, mtp)


def expert_weight_bytes(numbers: int, qat: bool) -> float:
    """Stored bytes of routed experts' weights: E2M1 with an E8M0 scale per 32 with QAT, else E4M3 with one per
    128 x 128 (the release's formats)."""
    if qat:
        assert EXPERT_FORMAT == "fp4"
        return numbers * (1 / 2 + 1 / 32)
    return numbers * (1 + 1 / 128**2)
