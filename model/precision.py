"""Storage formats of tensor roles, and quantization-aware training.

The configuration has a format for each role (:data:`model.config.CACHE_FORMATS`). The cache takes its layouts from
here, the forward pass its rounding.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.autocast import product_dtype
from kernels.cache_io import EntryLayout, pack
from kernels.quantize import fake_quantize, round_to_layout

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.forward.aux_outputs import AuxOutputs

EXPERT_FORMAT = "fp4"


def main_layout(config: ModelConfig) -> EntryLayout:
    """Return the layout of window and compressed entries."""
    return EntryLayout(
        config.head_dim - config.rope_head_dim, config.kv_format, config.rope_head_dim, config.rope_format
    )


def index_layout(config: ModelConfig) -> EntryLayout:
    """Return the layout of index keys, after the Hadamard rotation."""
    return EntryLayout(config.index_head_dim, config.index_format)


class Precision:
    """Rounding of a network's tensors to their storage formats.

    In training, tensors are rounded if ``qat`` is on, with straight-through gradients, and counted in the auxiliary
    outputs. Outside training they are always rounded.
    """

    def __init__(self, config: ModelConfig):
        self.qat = config.qat
        self.main_layout = main_layout(config)
        self.index_layout = index_layout(config)
        self.score_dtype = torch.bfloat16 if config.index_scores == "bf16" else torch.float32

    def round_main(self, x: Tensor, training: bool, aux: AuxOutputs | None = None) -> Tensor:
        """Round key-values [..., head_dim] as the cache returns them."""
        return self.round_to(x, "main", self.main_layout, training, aux)

    def round_index(self, x: Tensor, training: bool, aux: AuxOutputs | None = None) -> Tensor:
        """Round index queries or keys [..., index_head_dim], which are multiplied in the storage format."""
        return self.round_to(x, "index", self.index_layout, training, aux)

    def round_to(
        self, x: Tensor, role: str, layout: EntryLayout, training: bool, aux: AuxOutputs | None = None
    ) -> Tensor:
        """Round x [..., layout.size] to a layout."""
        rounding = self._rounding(role, layout, training, aux)
        return x if rounding is None else round_to_layout(x, rounding)

    def main_rounding(self, training: bool, aux: AuxOutputs | None = None) -> EntryLayout | None:
        """Return the layout to round key-values to, or None to leave them unrounded."""
        return self._rounding("main", self.main_layout, training, aux)

    def index_rounding(self, training: bool, aux: AuxOutputs | None = None) -> EntryLayout | None:
        """Return the layout to round index queries or keys to, or None to leave them unrounded."""
        return self._rounding("index", self.index_layout, training, aux)

    def _rounding(self, role: str, layout: EntryLayout, training: bool, aux: AuxOutputs | None) -> EntryLayout | None:
        if training:
            if not self.qat:
                return None
            _count(aux, role, layout.body_format, layout.rope_format if layout.rope else "fp32")
        return layout

    def round_expert(self, weight: Tensor, training: bool = False, aux: AuxOutputs | None = None) -> Tensor:
        """Round routed-expert weights [..., out, in] to FP4 blocks along the input dim if QAT is on."""
        if not self.qat:
            return weight
        if training:
            _count(aux, "experts", EXPERT_FORMAT)
            # Exact in BF16, so a product in BF16 need not convert them again.
            return fake_quantize(weight, EXPERT_FORMAT, product_dtype(weight))
        return fake_quantize(weight, EXPERT_FORMAT)

    def pack_expert(self, weight: Tensor) -> Tensor:
        """Pack weights [..., out, in] as :meth:`round_expert` rounds them: uint8 [..., out, bytes of a row]."""
        return pack(weight.float(), EntryLayout(weight.shape[-1], EXPERT_FORMAT))


def _count(aux: AuxOutputs | None, role: str, *formats: str) -> None:
    if aux is not None:
        aux.rounded[role] += any(name != "fp32" for name in formats)


def format_table(config: ModelConfig) -> list[tuple[str, str, str, int]]:
    """Return rows (tensor role, storage format, rounded in training, tensors per forward pass) for printing."""
    counts: Counter[tuple[str, str]] = Counter()
    for mixer in config.block_mixers:
        for stored in mixer.stored_formats(config):
            counts[stored.role, stored.format] += stored.tensors
    experts = 3 * config.block_ffn_kinds.count("moe")
    counts["routed expert weights", EXPERT_FORMAT if config.qat else "fp32"] += experts
    return [
        (role, name, "yes" if config.qat and name != "fp32" else "no", count)
        for (role, name), count in counts.items()
        if count
    ]
