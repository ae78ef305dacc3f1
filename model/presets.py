"""Named configurations, and a scaling rule that derives all widths from the depth."""

from __future__ import annotations

import math
from typing import Any

_RELEASE: dict[str, Any] = {
    # Values common to Flash and Pro (report 4.2.1; the released config.json).
    "vocab_size": 129_280,
    "mtp_layers": 1,
    "max_positions": 1_048_576,
    "head_dim": 512,
    "rope_head_dim": 64,
    "o_lora_rank": 1024,
    "window": 128,
    "yarn_factor": 16.0,
    "yarn_original_positions": 65_536,
    "csa_ratio": 4,
    "hca_ratio": 128,
    "index_heads": 64,
    "index_head_dim": 128,
    "experts_per_token": 6,
    "num_hash_layers": 3,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"zero_init_output": True, "init_std": 0.04},
    # 35.3M parameters with the byte vocabulary; used by the benchmarks.
    "small": {
        "hidden_size": 512,
        "layers": ("sliding", "sliding", "csa", "hca", "csa", "hca", "csa", "hca"),
        "max_positions": 1_048_576,
        "num_heads": 8,
        "head_dim": 128,
        "rope_head_dim": 16,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "window": 128,
        "hca_ratio": 128,
        "index_heads": 16,
        "index_head_dim": 32,
        "index_topk": 128,
        "num_experts": 8,
        "expert_size": 256,
        "num_hash_layers": 0,
    },
    "base": {
        "hidden_size": 1536,
        "layers": ("sliding", "sliding", *("csa", "hca") * 9, "csa"),
        "max_positions": 1_048_576,
        "vocab_size": 32_768,
        "num_heads": 16,
        "head_dim": 256,
        "rope_head_dim": 32,
        "q_lora_rank": 384,
        "o_groups": 2,
        "o_lora_rank": 512,
        "window": 128,
        "hca_ratio": 128,
        "index_heads": 32,
        "index_head_dim": 64,
        "index_topk": 512,
        "num_experts": 16,
        "expert_size": 640,
        "num_hash_layers": 3,
    },
    "v4-flash": {
        **_RELEASE,
        "hidden_size": 4096,
        "layers": ("sliding", "sliding", *("csa", "hca") * 20, "csa"),
        "num_heads": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "index_topk": 512,
        "num_experts": 256,
        "expert_size": 2048,
        "routed_scaling_factor": 1.5,
    },
    "v4-pro": {
        **_RELEASE,
        "hidden_size": 7168,
        "layers": ("hca", "hca", *("csa", "hca") * 29, "csa"),
        "num_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "index_topk": 1024,
        "num_experts": 384,
        "expert_size": 3072,
        "routed_scaling_factor": 2.5,
    },
}

MIN_DEPTH, MAX_DEPTH = 4, 61
"""Depth of the shallowest schedule with every kind of layer, and of the largest release."""


def depth_values(depth: int) -> dict[str, Any]:
    """Return the fields of a network with ``depth`` layers, MIN_DEPTH <= depth <= MAX_DEPTH.

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
    hidden = 128 * max(1, _nearest(depth * release["hidden_size"] / flash / 128))
    head = min(512, max(64, 2 ** _nearest(math.log2(hidden / 8))))
    groups = _nearest(hidden / head)
    experts = 8 * max(1, _nearest(depth * release["num_experts"] / flash / 8))
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
        "index_heads": min(64, 8 * max(1, _nearest(hidden / 64 / 8))),
        "index_head_dim": head // 4,
        "index_topk": hidden // 8,
        "num_experts": experts,
        "experts_per_token": min(release["experts_per_token"], experts // 8),
        "expert_size": hidden // 2,
        "num_hash_layers": min(release["num_hash_layers"], depth // 4),
    }


def _nearest(x: float) -> int:
    """Round halves up. Python's ``round`` rounds them to even, so widths would not grow evenly with depth."""
    return math.floor(x + 0.5)
