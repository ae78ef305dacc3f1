"""Which tensor is stored in which format, and when the network pretends that it already is.

One table per policy; everything else reads it: the cache takes its layouts from here, the forward pass its rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cache_io import EntryLayout
from kernels.quantize import fake_quantize
from model.config import ModelConfig

POLICIES: dict[str, dict[str, str]] = {
    # role -> storage format; DeepSeek-V4's own choices (report 2.3.4, 5.2.1)
    "mixed": {"main_kv": "fp8", "rope": "bf16", "index": "fp4"},
    "bf16": {"main_kv": "bf16", "rope": "bf16", "index": "bf16"},
    "fp32": {"main_kv": "fp32", "rope": "fp32", "index": "fp32"},
}
EXPERT_FORMAT = "fp4"


class Precision:
    """The precision policy of one network.

    ``main_layout`` describes window and compressed entries, ``index_layout`` index keys (after the Hadamard rotation).
    """

    def __init__(self, config: ModelConfig):
        roles = POLICIES[config.cache_precision]
        self.roles = roles
        self.qat = config.qat
        rope = config.rope_head_dim
        self.main_layout = EntryLayout(config.head_dim - rope, roles["main_kv"], rope, roles["rope"])
        self.index_layout = EntryLayout(config.index_head_dim, roles["index"])

    def round_main(self, x: Tensor, training: bool) -> Tensor:
        """Main key-values [..., head_dim] as the cache would return them."""
        if training and not self.qat:
            return x
        layout = self.main_layout
        if layout.body_format == layout.rope_format:
            return fake_quantize(x, layout.body_format)
        body, rope = x.split((layout.body, layout.rope), dim=-1)
        return torch.cat((fake_quantize(body, layout.body_format), fake_quantize(rope, layout.rope_format)), dim=-1)

    def round_index(self, x: Tensor, training: bool) -> Tensor:
        """Index queries or keys [..., index_head_dim], both multiplied in the storage format."""
        return x if training and not self.qat else fake_quantize(x, self.roles["index"])

    def round_expert(self, weight: Tensor) -> Tensor:
        """Routed-expert weights [..., out, in]: FP4 blocks along the input dim where QAT is on, untouched elsewhere."""
        return fake_quantize(weight, EXPERT_FORMAT) if self.qat else weight

    def table(self, config: ModelConfig) -> list[tuple[str, str, str, int]]:
        """Rows (tensor role, storage format, rounded while training, tensors per forward) for printing."""
        compressed = sum(name in ("csa", "hca") for name in config.layers)
        hybrid = compressed + config.layers.count("sliding") + config.mtp_layers
        csa, gqa = config.layers.count("csa"), config.layers.count("gqa")
        experts = 3 * (config.num_layers + config.mtp_layers) if config.ffn == "moe" else 0
        expert_format = EXPERT_FORMAT if self.qat else "fp32"
        rows = (
            ("window and compressed entries, unrotated dims", self.roles["main_kv"], hybrid + compressed),
            ("window and compressed entries, rotary dims", self.roles["rope"], hybrid + compressed),
            ("index queries and keys (after Hadamard)", self.roles["index"], 2 * csa),
            ("gqa keys and values", gqa_format(config), 2 * gqa),
            ("routed expert weights", expert_format, experts),
        )
        return [(role, fmt, "yes" if self.qat and fmt != "fp32" else "no", count) for role, fmt, count in rows if count]


def gqa_format(config: ModelConfig) -> str:
    """The baseline's cache format: BF16, or FP32 where the policy asks for it. FP8 and FP4 are V4's choices."""
    return "fp32" if config.cache_precision == "fp32" else "bf16"


def in_float32(x: Tensor) -> torch.autocast:
    """A context in which autocast is off: router, head, hyper-connection weights and compressors compute in float32,
    because what they decide (routes, selections, mixing) would differ between training and inference otherwise."""
    return torch.autocast(x.device.type, enabled=False)
