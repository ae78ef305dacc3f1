"""Closed-form FLOPs of decoding one token.

One sequence decodes its n-th token with the number formats of the released kernels; the multi-token prediction module
is idle. A multiply-add is two FLOPs. Includes matrix products, the mixing of residual streams, short convolutions and
state updates; excludes norms, softmax, pooling, rotations, rounding and the sum over index heads.
"""

from __future__ import annotations

from model.config import ModelConfig
from model.work import Work, WorkKind

_KINDS = ("linear", "index", "core", "residual")


def decode_work(config: ModelConfig, tokens: int) -> list[Work]:
    """Return the work of decoding the ``tokens``-th token of a sequence, summed over layers. Parts without work are
    omitted.

    Visible entries follow the model's causality: the n-th token sees n // ratio of them, and csa attends to at most
    ``index_topk`` (report eq. 13-23).
    """
    parts = [work for mixer in config.mixers for work in mixer.work(config, tokens)]
    parts += _residual(config) + feed_forward_work(config)
    parts.append(Work("head", "linear", "bf16", 2.0 * config.hidden_size * config.vocab_size))
    total: dict[tuple[str, WorkKind, str], float] = {}
    for work in sorted(parts, key=lambda work: _KINDS.index(work.kind)):
        key = work.part, work.kind, work.format
        total[key] = total.get(key, 0.0) + work.flops
    return [Work(part, kind, format, flops) for (part, kind, format), flops in total.items() if flops]


def _residual(c: ModelConfig) -> list[Work]:
    if not c.hyper_connections:
        return []
    n, d = c.hc_mult, c.hidden_size
    blocks = c.num_layers + sum(kind != "none" for kind in c.ffn_kinds)
    weights = blocks * (2 * n + n * n) * n * d + n * n * d  # around every block and before the head
    mixing = blocks * (n * n + 2 * n) * d + n * d
    return [
        Work("hyper-connections: weights", "residual", "bf16", 2.0 * weights),
        Work("hyper-connections: mixing", "residual", "bf16", 2.0 * mixing),
    ]


def feed_forward_work(config: ModelConfig) -> list[Work]:
    """Return the feed-forward part of :func:`decode_work`: dense blocks, routers, shared and active routed
    experts. Parts that no layer has are zero."""
    c = config
    dense, moe = (2.0 * c.ffn_kinds.count(kind) for kind in ("dense", "moe"))
    expert = moe * 3 * c.hidden_size * c.expert_size
    return [
        Work("feed-forward", "linear", "fp8", dense * 3 * c.hidden_size * c.ffn_size),
        Work("router", "linear", "bf16", moe * c.num_experts * c.hidden_size),
        Work("shared experts", "linear", "fp8", c.num_shared_experts * expert),
        Work("routed experts", "linear", "fp4 weights" if c.qat else "fp8", c.experts_per_token * expert),
    ]
