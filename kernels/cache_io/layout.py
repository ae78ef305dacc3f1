"""Byte layout of a cache entry.

An entry has ``body`` dims in one format, followed by ``rope`` dims in another::

    [ body values | rope values | padding | scales of the body | padding ]

At the sizes of DeepSeek-V4 an entry of 448 E4M3 values, 64 BF16 values (128 bytes), 7 E8M0 scales and 1 byte of padding
takes 584 bytes. An index key of 128 E2M1 values and 4 scales takes 68 bytes. At those of V3.2, in ``fp8_128``, a latent
of 512 E4M3 values, 64 BF16 values and 4 FP32 scales takes 656 bytes, and an index key of 128 values 132.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kernels import formats


class BlockScales(NamedTuple):
    """Block-scaled format: an element format and one power-of-two scale per block of dims."""

    grid: str
    """Element format of the scaled values: ``e4m3`` or ``e2m1``."""
    block: int
    """Dims per scale."""
    max: float
    """Largest value of the grid."""
    floor: float
    """Floor of a block's largest magnitude."""
    nbytes: int
    """Bytes of a stored scale: 1 (E8M0) or 4 (FP32)."""


SCALED_FORMATS = {
    "fp8": BlockScales("e4m3", formats.FP8_BLOCK, formats.E4M3_MAX, formats.FP8_AMAX_FLOOR, 1),
    "fp8_128": BlockScales("e4m3", formats.FP8_WIDE_BLOCK, formats.E4M3_MAX, formats.FP8_AMAX_FLOOR, 4),
    "fp4": BlockScales("e2m1", formats.FP4_BLOCK, formats.E2M1_MAX, formats.FP4_AMAX_FLOOR, 1),
}
"""Formats with block scales. ``fp8_128`` is DeepSeek-V3.2's."""
FORMAT_BITS = {"fp4": 4, "fp8": 8, "fp8_128": 8, "bf16": 16, "fp32": 32}
"""Bits per value, without scales."""
_NATIVE_CODES = {"fp32": 0, "bf16": 1, "fp8": 2, "fp4": 3, "fp8_128": 4}


@dataclass(frozen=True)
class EntryLayout:
    """Formats of one entry: ``body`` dims as ``body_format``, then ``rope`` dims as ``rope_format``."""

    body: int
    body_format: str
    rope: int = 0
    rope_format: str = "bf16"

    @property
    def size(self) -> int:
        """Dims of an entry."""
        return self.body + self.rope

    @property
    def spec(self) -> tuple[int, int, int, int]:
        """The layout as an argument of native operators."""
        return self.body, _NATIVE_CODES[self.body_format], self.rope, _NATIVE_CODES[self.rope_format]

    @property
    def block(self) -> int:
        """Dims that share a scale."""
        return min(SCALED_FORMATS[self.body_format].block, self.body)

    @property
    def scales(self) -> int:
        """Number of scales."""
        return -(-self.body // self.block) if self.body_format in SCALED_FORMATS else 0

    @property
    def body_bytes(self) -> int:
        """Bytes of the body's values, without scales."""
        return self.body * FORMAT_BITS[self.body_format] // 8

    @property
    def rope_bytes(self) -> int:
        """Bytes of the rope values."""
        return self.rope * FORMAT_BITS[self.rope_format] // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of one scale."""
        return SCALED_FORMATS[self.body_format].nbytes if self.scales else 1

    @property
    def scale_offset(self) -> int:
        """Offset of the scales in bytes."""
        used = self.body_bytes + self.rope_bytes
        return used + -used % self.scale_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of an entry, including padding."""
        used = self.scale_offset + self.scales * self.scale_bytes
        # Rows are adjacent in memory, and their float parts must be aligned to the width of a float.
        wide = "fp32" in (self.body_format, self.rope_format) or self.scale_bytes == 4
        return used + -used % (4 if wide else 2)
