"""Scaling by depth: families of networks that derive all sizes from the number of layers.

The proportions of each family are those of its published networks. A family also gives its sequence mixers at a given
width, number of layers and number of heads, for comparisons (:func:`model.costs.family_config`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from model.errors import ConfigError
from model.presets import PRESETS
from model.wording import quote


@dataclass(frozen=True)
class Family:
    """Networks of one design. ``depths`` are the numbers of layers that it scales to."""

    title: str
    depths: range
    values: Callable[[int], dict[str, Any]]
    """Return the fields of ModelConfig for a number of layers."""
    mixers: Callable[[int, int, int], dict[str, Any]] | None = None
    """Return the fields for the mixers of a network by hidden width, layers and query heads, without its feed-forward.
    None if the mixers do not follow from these."""


def depth_values(depth: Any, family: Any = "v4") -> dict[str, Any]:
    """Return the fields of the network of ``family`` with ``depth`` layers. Raises ConfigError."""
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(f"family: expected one of {', '.join(FAMILIES)}, found {quote(family)}")
    found = FAMILIES[family]
    least, most = found.depths[0], found.depths[-1]
    if type(depth) is not int or depth not in found.depths:
        of = "" if family == "v4" else f" for family '{family}'"
        raise ConfigError(f"depth: expected a whole number from {least} to {most}{of}, found {quote(depth)}")
    return found.values(depth)


# --- the hybrid of DeepSeek-V4


def _v4_values(depth: int) -> dict[str, Any]:
    """Return a DeepSeek-V4 hybrid.

    Proportions are those of Flash (report 4.2.1), so 43 layers give Flash. Pro's are in brackets where they differ:

    * hidden: 4096 / 43 per layer, to a multiple of 128 [7168 / 61];
    * head: the power of two nearest to hidden / 8, from 64 to 512; rotary dims 1/8 and index head 1/4 of it;
    * query heads: 8 per output group, total width about 8 * hidden [9.1]; output latent 1/4 of a group;
    * query latent: hidden / 4 [0.21];
    * indexer: hidden / 64 heads to a multiple of 8, at most 64 [64]; top-k hidden / 8 [1/7], which covers
      hidden / 2 tokens at ratio 4;
    * experts: 256 / 43 per layer to a multiple of 8 [384 / 61], inner width hidden / 2 [0.43], 6 per token or an
      eighth of the experts if that is fewer;
    * layers: 2 sliding layers, or 1 if the depth is even, then alternating csa and hca, ending with csa;
      the first 3 route by token ID, fewer below 12 layers;
    * window 128 = hca ratio, csa ratio 4, vocabulary, positions, YaRN and multi-token module as released.
    """
    release, flash = PRESETS["v4-flash"], len(PRESETS["v4-flash"]["layers"])
    hidden = _to_multiple(depth * release["hidden_size"] / flash, 128)
    head = min(512, max(64, 2 ** _nearest(math.log2(hidden / 8))))
    groups = _nearest(hidden / head)
    experts = _to_multiple(depth * release["num_experts"] / flash, 8)
    sliding = 2 if depth % 2 else 1
    return {
        **release,
        "hidden_size": hidden,
        "layers": ("sliding",) * sliding + ("csa", "hca") * ((depth - sliding - 1) // 2) + ("csa",),
        "num_heads": 8 * groups,
        "head_dim": head,
        "rope_head_dim": head // 8,
        "q_lora_rank": hidden // 4,
        "o_groups": groups,
        "o_lora_rank": 8 * head // 4,
        "index_heads": min(64, _to_multiple(hidden / 64, 8)),
        "index_head_dim": head // 4,
        "index_topk": hidden // 8,
        "num_experts": experts,
        "experts_per_token": min(release["experts_per_token"], experts // 8),
        "expert_size": hidden // 2,
        "num_hash_layers": min(release["num_hash_layers"], depth // 4),
    }


# --- DeepSeek-V3.2


def _v32_values(depth: int) -> dict[str, Any]:
    """Return a DeepSeek-V3.2 network.

    Proportions are those of the release (config.json; V3 report 4.2), so 61 layers give V3.2:

    * hidden: 7168 / 61 per layer, to a multiple of 128;
    * heads: total width about 16/7 of hidden, to a multiple of 8; sizes of a head and of the indexer by
      :func:`_v32_mixers`;
    * feed-forward: 18/7 of hidden in the leading dense layers, 3 of 61 and at least 1;
    * experts: 256 / 61 per layer to a multiple of 8, inner width 2/7 of hidden, 8 per token or an eighth of the experts
      if that is fewer; 8 groups of which 4 are used, vocabulary, positions and YaRN as released.
    """
    release = PRESETS["v3.2"]
    layers = len(release["layers"])
    hidden = _to_multiple(depth * release["hidden_size"] / layers, 128)
    experts = _to_multiple(depth * release["num_experts"] / layers, 8)
    heads = _to_multiple(16 / 7 * hidden / _head(hidden), 8)
    return {
        **release,
        **_v32_mixers(hidden, depth, heads),
        "hidden_size": hidden,
        "first_k_dense_replace": max(1, _nearest(depth * release["first_k_dense_replace"] / layers)),
        "ffn_size": _to_multiple(18 / 7 * hidden, 32),
        "num_experts": experts,
        "experts_per_token": min(release["experts_per_token"], experts // 8),
        "expert_size": _to_multiple(2 / 7 * hidden, 32),
    }


def _v32_mixers(hidden: int, depth: int, heads: int) -> dict[str, Any]:
    """Return dsa layers: sizes of a head by :func:`_latent`, a query latent of 3/14 of hidden, and an indexer of half
    as many heads with as many dims that selects 2/7 of hidden tokens, to a multiple of 64."""
    release, head = PRESETS["v3.2"], _head(hidden)
    kept = ("yarn_factor", "yarn_original_positions", "kv_format", "index_format")
    return {
        **{name: release[name] for name in kept},
        "layers": ("dsa",) * depth,
        "num_heads": heads,
        "index_heads": max(1, heads // 2),
        "index_head_dim": head,
        "index_topk": _to_multiple(2 / 7 * hidden, 64),
        "mixer_options": {"dsa": {"q_lora_rank": _to_multiple(3 / 14 * hidden, 32), **_latent(head)}},
    }


# --- Mamba-2


def _mamba2_values(depth: int) -> dict[str, Any]:
    """Return a Mamba-2 network without feed-forward.

    Hidden is 40 per layer, to a multiple of 128, as in the 2.7B network (64 layers; the others of arXiv 2405.21060 have
    21 to 43 per layer). Twice as many channels in heads of 64, states of 128, vocabulary and the tied
    head are published for all sizes.
    """
    release = PRESETS["mamba2-2.7b"]
    hidden = _to_multiple(depth * release["hidden_size"] / len(release["layers"]), 128)
    return {**release, **_mamba2_mixers(hidden, depth, hidden // 32), "hidden_size": hidden}


def _mamba2_mixers(hidden: int, depth: int, heads: int) -> dict[str, Any]:
    """Return mamba2 layers of 2 * hidden channels, in ``heads`` heads if these divide them, else in heads of 64."""
    options, inner = PRESETS["mamba2-2.7b"]["mixer_options"]["mamba2"], 2 * hidden
    own = heads if inner % heads == 0 else inner // math.gcd(inner, 64)
    sizes = {"num_heads": own, "head_dim": inner // own}
    return {
        "layers": ("mamba2",) * depth,
        "num_heads": heads,
        "mixer_options": {"mamba2": {**options, **sizes}},
    }


# --- Kimi Linear


def _kimi_values(depth: int) -> dict[str, Any]:
    """Return a Kimi Linear network.

    Proportions are those of Kimi-Linear-48B-A3B (config.json; arXiv 2510.26692), so 27 layers give it:

    * hidden: 2304 / 27 per layer, to a multiple of 128;
    * heads: total width about 16/9 of hidden, to a multiple of 4; sizes of a head by :func:`_kimi_mixers`;
    * feed-forward: 4 * hidden in the first layer;
    * experts: 256 / 27 per layer to a multiple of 8, inner width 4/9 of hidden, 8 per token or an eighth of the experts
      if that is fewer; vocabulary and positions as released.
    """
    release = PRESETS["kimi-linear-48b-a3b"]
    layers = len(release["layers"])
    hidden = _to_multiple(depth * release["hidden_size"] / layers, 128)
    experts = _to_multiple(depth * release["num_experts"] / layers, 8)
    heads = _to_multiple(16 / 9 * hidden / _head(hidden), 4)
    return {
        **release,
        **_kimi_mixers(hidden, depth, heads),
        "hidden_size": hidden,
        "ffn_size": 4 * hidden,
        "num_experts": experts,
        "experts_per_token": min(release["experts_per_token"], experts // 8),
        "expert_size": _to_multiple(4 / 9 * hidden, 32),
    }


def _kimi_mixers(hidden: int, depth: int, heads: int) -> dict[str, Any]:
    """Return kda layers, with mla without positions as every fourth and as the last layer: sizes of a head by
    :func:`_latent`, and no query latent."""
    head = _head(hidden)
    latent = {**PRESETS["kimi-linear-48b-a3b"]["mixer_options"]["mla"], **_latent(head)}
    return {
        "layers": tuple("mla" if n % 4 == 0 or n == depth else "kda" for n in range(1, depth + 1)),
        "num_heads": heads,
        "kv_format": "bf16",
        "mixer_options": {"kda": {"num_heads": heads, "head_dim": head}, "mla": latent},
    }


# --- grouped-query attention


def _gqa_values(depth: int) -> dict[str, Any]:
    """Return a network with grouped-query attention in BF16 and dense feed-forward blocks.

    Proportions are those of Llama 3 8B (arXiv 2407.21783, table 3), so 32 layers have its sizes: hidden 128 per layer,
    feed-forward 3.5 * hidden, heads of as many dims together as hidden, sizes of a head by :func:`_gqa_mixers`. The
    405B network has the same width per layer within 2% (126 layers), the 70B network 20% less (80 layers). Vocabulary
    and positions are those of Llama 3.1, without its scaling of rotary frequencies.
    """
    hidden = 128 * depth
    return {
        **_gqa_mixers(hidden, depth, hidden // _head(hidden)),
        "vocab_size": 128_256,
        "hidden_size": hidden,
        "max_positions": 131_072,
        "norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "hyper_connections": False,
        "qat": False,
        "ffn": "dense",
        "ffn_size": 7 * hidden // 2,
        "swiglu_limit": 0.0,
        "num_hash_layers": 0,
    }


def _gqa_mixers(hidden: int, depth: int, heads: int) -> dict[str, Any]:
    """Return gqa layers: a key-value head per 4 query heads, at most 8, and fewer if they would not divide the heads;
    sizes of a head by :func:`_head`."""
    head = _head(hidden)
    most = min(8, max(1, heads // 4))
    return {
        "layers": ("gqa",) * depth,
        "num_heads": heads,
        "num_kv_heads": next(count for count in range(most, 0, -1) if heads % count == 0),
        "head_dim": head,
        "rope_head_dim": head // 2,
        "gqa_format": "bf16",
    }


FAMILIES = {
    "v4": Family("DeepSeek-V4", range(4, 62), _v4_values),
    "v32": Family("DeepSeek-V3.2 (MLA + DSA, FP8)", range(4, 62), _v32_values, _v32_mixers),
    "mamba2": Family("Mamba-2", range(4, 65), _mamba2_values, _mamba2_mixers),
    "kimi": Family("Kimi Linear (KDA and MLA 3:1)", range(4, 28), _kimi_values, _kimi_mixers),
    "gqa": Family("GQA (BF16)", range(4, 127), _gqa_values, _gqa_mixers),
}
"""Families by name. The deepest network of a family is its largest published one, and 4 layers have every kind."""


def _head(hidden: int) -> int:
    """Return the dims of a head: the power of two nearest to hidden / 16, from 32 to 128. DeepSeek-V2-Lite, V3.2, Kimi
    Linear and Llama 3 have 128 at widths from 2048 to 16384."""
    return min(128, max(32, 2 ** _nearest(math.log2(hidden / 16))))


def _latent(head: int) -> dict[str, int]:
    """Return the published sizes of latent attention: a latent of 4 heads and half a head of rotary dims."""
    return {"kv_lora_rank": 4 * head, "qk_nope_head_dim": head, "qk_rope_head_dim": head // 2, "v_head_dim": head}


def _to_multiple(x: float, unit: int) -> int:
    """Return the positive multiple of ``unit`` nearest to ``x``."""
    return unit * max(1, _nearest(x / unit))


def _nearest(x: float) -> int:
    """Round halves up. Python's ``round`` rounds them to even, so widths would not grow evenly with depth."""
    return math.floor(x + 0.5)
