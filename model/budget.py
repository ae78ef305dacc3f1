"""Closed-form cache sizes: what :class:`model.cache.Cache` must measure.

Counting rule: growing bytes per token are packed entries (scales and padding included) over the tokens they cover;
window, tails and page rounding are the fixed state, which does not grow with the sequence.
"""

from __future__ import annotations

from model.config import ModelConfig
from model.precision import Precision, gqa_format

_FLOAT32 = 4
_GQA_BYTES = {"bf16": 2, "fp32": 4}


def cache_bytes_per_token(config: ModelConfig) -> dict[str, float]:
    """Growing cache bytes per token, by component (``csa``, ``hca``, ``index``, ``gqa``), summed over layers."""
    precision = Precision(config)
    count = {name: config.layers.count(name) for name in ("csa", "hca", "gqa")}
    return {
        "csa": count["csa"] * precision.main_layout.nbytes / config.csa_ratio,
        "hca": count["hca"] * precision.main_layout.nbytes / config.hca_ratio,
        "index": count["csa"] * precision.index_layout.nbytes / config.csa_ratio,
        "gqa": count["gqa"] * 2.0 * config.num_kv_heads * config.head_dim * _GQA_BYTES[gqa_format(config)],
    }


def fixed_state_bytes(config: ModelConfig) -> dict[str, int]:
    """Bytes per sequence that do not grow: the sliding windows, and the compressors' tails in float32."""
    windowed = sum(name != "gqa" for name in config.layers)
    tail = 0
    for name in config.layers:
        if name == "csa":
            tail += (2 * config.csa_ratio - 1) * 4 * (config.head_dim + config.index_head_dim) * _FLOAT32
        elif name == "hca":
            tail += (config.hca_ratio - 1) * 2 * config.head_dim * _FLOAT32
    return {"window": windowed * config.window * Precision(config).main_layout.nbytes, "tail": tail}


def cache_bytes(config: ModelConfig, tokens: int) -> float:
    """Closed-form cache bytes of one sequence of ``tokens`` tokens, fixed state included, page rounding excluded."""
    return sum(cache_bytes_per_token(config).values()) * tokens + sum(fixed_state_bytes(config).values())
