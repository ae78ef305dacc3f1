"""Work of a decode step, in FLOPs by number format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FP8_EQUIVALENT = {"bf16": 2.0, "fp8": 1.0, "fp4 weights": 1.0, "fp4": 0.5}
"""FP8 FLOPs that take the time of one FLOP in each format. FP4 weights meet FP8 activations, which today's hardware
multiplies at FP8's peak (report 5.2.1); only the index products have FP4 on both sides. The report does not state its
weights; these reproduce its published ratios to V3.2."""


def product_format(stored: str) -> str:
    """Return the format of products with operands in a storage format, a key of :data:`FP8_EQUIVALENT`."""
    return {"fp32": "bf16", "fp8_128": "fp8"}.get(stored, stored)


WEIGHTING = (
    "equivalent FP8 FLOPs: BF16 x2, FP8 x1, FP4 index products x0.5, FP4 experts (FP8 activations) x1; "
    "core attention counts as BF16, and so does what runs in FP32 (head, router, compressors, hyper-connections, "
    "recurrent states)"
)

WorkKind = Literal["linear", "index", "core", "residual"]


@dataclass(frozen=True)
class Work:
    """One part of a decode step. ``format`` is the number format of the products, a key of :data:`FP8_EQUIVALENT`."""

    part: str
    kind: WorkKind
    format: str
    flops: float

    @property
    def equivalent(self) -> float:
        """FP8 FLOPs of equal cost."""
        return self.flops * FP8_EQUIVALENT[self.format]
