"""Named configurations, and the one dial that derives all widths from a depth."""

from __future__ import annotations

import math
from typing import Any

_RELEASE: dict[str, Any] = {
    # What Flash and Pro share (report 4.2.1; the released config.json).
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
    # 35.3M parameters with the byte vocabulary: the size every benchmark speaks of.
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
"""The shallowest schedule with every kind of layer, and the depth of the largest release."""


def depth_values(depth: int) -> dict[str, Any]:
    """The fields of the family member with ``depth`` layers, for MIN_DEPTH <= depth <= MAX_DEPTH.

    Flash's proportions (report 4.2.1), because 43 layers must give Flash itself; Pro's, where they differ, in brackets:

    * hidden: 4096 / 43 per layer, to a multiple of 128 [7168 / 61];
    * head: the power of two nearest to hidden / 8, from 64 to 512; rotary 1/8 of it, index head 1/4;
    * query heads: 8 per output group, about 8 * hidden wide together [9.1]; a group of 8 heads shrinks 4 : 1;
    * query latent: hidden / 4 [0.21];
    * indexer: hidden / 64 heads to a multiple of 8, at most 64 [64]; top-k hidden / 8 [1/7], so that it covers
      half of ``hidden`` tokens at ratio 4;
    * experts: 256 / 43 per layer to a multiple of 8 [384 / 61], of inner width hidden / 2 [0.43], 6 per token, and
      an eighth of the experts where that is fewer;
    * layers: one hca per csa but for the last, which is csa; before them 2 sliding ones, or 1 where the depth is even;
      the first 3 route by token id, fewer below 12 layers;
    * window 128 = hca ratio, csa ratio 4, vocabulary, positions, YaRN and the multi-token module: as released.
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
    """Halves go up: Python's ``round`` sends them to the even neighbour, which would not grow evenly."""
    return math.floor(x + 0.5)
