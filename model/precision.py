"""Which tensor is stored in which format, and when the network pretends that it already is.

The configuration has a format for each role (:data:`model.config.CACHE_FORMATS`); the cache takes its layouts from
here, the forward pass its rounding.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from kernels.autocast import product_dtype
from kernels.cache_io import EntryLayout, pack
from kernels.quantize import fake_quantize, round_to_layout
from model.config import ModelConfig

EXPERT_FORMAT = "fp4"


class Precision:
    """One network's formats, as layouts.

    ``main_layout`` describes window and compressed entries, ``index_layout`` index keys (after the Hadamard rotation),
    ``gqa_layout`` one token's keys and values of all heads, side by side.
    """

    def __init__(self, config: ModelConfig):
        c = config
        self.qat = c.qat
        self.rounded: Counter[str] = Counter()
        """Tensors rounded in training since somebody last looked, by role."""
        self.main_layout = EntryLayout(c.head_dim - c.rope_head_dim, c.kv_format, c.rope_head_dim, c.rope_format)
        self.index_layout = EntryLayout(c.index_head_dim, c.index_format)
        self.score_dtype = torch.bfloat16 if c.index_scores == "bf16" else torch.float32
        self.gqa_layout = EntryLayout(2 * c.num_kv_heads * c.head_dim, c.gqa_format)

    def round_main(self, x: Tensor, training: bool) -> Tensor:
        """Main key-values [..., head_dim] as the cache would return them."""
        return self._round(x, "main", self.main_layout, training)

    def round_index(self, x: Tensor, training: bool) -> Tensor:
        """Index queries or keys [..., index_head_dim], both multiplied in the storage format."""
        return self._round(x, "index", self.index_layout, training)

    def round_gqa(self, x: Tensor, training: bool) -> Tensor:
        """Rows [..., 2 * num_kv_heads * head_dim] of a gqa layer. They are rounded whole, as they are stored: where
        heads are narrower than a block, neighbours share its scale."""
        return self._round(x, "gqa", self.gqa_layout, training)

    def _round(self, x: Tensor, role: str, layout: EntryLayout, training: bool) -> Tensor:
        if training:
            if not self.qat:
                return x
            self._count(role, layout.body_format, layout.rope_format if layout.rope else "fp32")
        return round_to_layout(x, layout)

    def round_expert(self, weight: Tensor, training: bool = False) -> Tensor:
        """Routed-expert weights [..., out, in]: FP4 blocks along the input dim where QAT is on, untouched elsewhere."""
        if not self.qat:
            return weight
        if training:
            self._count("experts", EXPERT_FORMAT)
            # Exact in BF16, so that a product in it need not convert them again.
            return fake_quantize(weight, EXPERT_FORMAT, product_dtype(weight))
        return fake_quantize(weight, EXPERT_FORMAT)

    def pack_expert(self, weight: Tensor) -> Tensor:
        """:meth:`round_expert` as packed rows, uint8 [..., out, bytes of a row]."""
        return pack(weight.float(), EntryLayout(weight.shape[-1], EXPERT_FORMAT))

    def _count(self, role: str, *formats: str) -> None:
        self.rounded[role] += any(name != "fp32" for name in formats)

    def table(self, config: ModelConfig) -> list[tuple[str, str, str, int]]:
        """Rows (tensor role, storage format, rounded while training, tensors per forward) for printing."""
        compressed = sum(name in ("csa", "hca") for name in config.layers)
        hybrid = compressed + config.layers.count("sliding") + config.mtp_layers
        csa, gqa = config.layers.count("csa"), config.layers.count("gqa")
        experts = 3 * (config.num_layers + config.mtp_layers) if config.ffn == "moe" else 0
        expert_format = EXPERT_FORMAT if self.qat else "fp32"
        rows = (
            ("window and compressed entries, unrotated dims", config.kv_format, hybrid + compressed),
            ("window and compressed entries, rotary dims", config.rope_format, hybrid + compressed),
            ("index queries and keys (after Hadamard)", config.index_format, 2 * csa),
            ("gqa keys and values", config.gqa_format, gqa),
            ("routed expert weights", expert_format, experts),
        )
        return [(role, fmt, "yes" if self.qat and fmt != "fp32" else "no", count) for role, fmt, count in rows if count]
