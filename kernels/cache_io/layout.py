"""Byte layout of a cache entry.

An entry has ``body`` dims in one format, followed by ``rope`` dims in another::

    [ body values | rope values | E8M0 scales of the body | padding ]

At the released sizes an entry of 448 E4M3 values, 64 BF16 values (128 bytes), 7 scales and 1 byte of padding takes 584
bytes. An index key of 128 E2M1 values and 4 scales takes 68 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels import formats

SCALED_FORMATS = {
    "fp8": (formats.FP8_BLOCK, formats.E4M3_MAX, formats.FP8_AMAX_FLOOR),
    "fp4": (formats.FP4_BLOCK, formats.E2M1_MAX, formats.FP4_AMAX_FLOOR),
}
"""Block size, largest value and floor of the block maximum, for formats with block scales."""
_BYTES_PER_VALUE = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp4": 0.5}
_NATIVE_CODES = {"fp32": 0, "bf16": 1, "fp8": 2, "fp4": 3}


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
        return min(SCALED_FORMATS[self.body_format][0], self.body)

    @property
    def scales(self) -> int:
        """Number of scales."""
        return -(-self.body // self.block) if self.body_format in SCALED_FORMATS else 0

    @property
    def body_bytes(self) -> int:
        """Bytes of the body's values, without scales."""
        return int(self.body * _BYTES_PER_VALUE[self.body_format])

    @property
    def rope_bytes(self) -> int:
        """Bytes of the rope values."""
        return int(self.rope * _BYTES_PER_VALUE[self.rope_format])

    @property
    def nbytes(self) -> int:
        """Bytes of an entry, including padding."""
        used = self.body_bytes + self.rope_bytes + self.scales
        # Rows are adjacent in memory, and their float parts must be aligned to the width of a float.
        return used + -used % (4 if "fp32" in (self.body_format, self.rope_format) else 2)
