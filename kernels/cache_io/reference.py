"""Packing of cache entries, in eager PyTorch.

An entry of ``size`` dims is ``body`` dims in one format followed by ``rope`` dims in another. In memory::

    [ body values | rope values | E8M0 scales of the body | padding ]

At the released sizes: 448 E4M3 + 64 BF16 (128 bytes) + 7 scales + 1 = 584 bytes; an index key of 128 E2M1 values and
4 scales is 68 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import formats

_SCALED = {
    "fp8": (formats.FP8_BLOCK, formats.E4M3_MAX, formats.FP8_AMAX_FLOOR),
    "fp4": (formats.FP4_BLOCK, formats.E2M1_MAX, formats.FP4_AMAX_FLOOR),
}
_WIDTH = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp4": 0.5}
_CODES = {"fp32": 0, "bf16": 1, "fp8": 2, "fp4": 3}
_PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EntryLayout:
    """How one entry is stored: ``body`` dims as ``body_format``, then ``rope`` dims as ``rope_format``."""

    body: int
    body_format: str
    rope: int = 0
    rope_format: str = "bf16"

    @property
    def size(self) -> int:
        return self.body + self.rope

    @property
    def spec(self) -> tuple[int, int, int, int]:
        """The layout as native operators take it."""
        return self.body, _CODES[self.body_format], self.rope, _CODES[self.rope_format]

    @property
    def block(self) -> int:
        return min(_SCALED[self.body_format][0], self.body)

    @property
    def scales(self) -> int:
        return -(-self.body // self.block) if self.body_format in _SCALED else 0

    @property
    def body_bytes(self) -> int:
        return int(self.body * _WIDTH[self.body_format])

    @property
    def rope_bytes(self) -> int:
        return int(self.rope * _WIDTH[self.rope_format])

    @property
    def nbytes(self) -> int:
        """Bytes per entry, padding included."""
        used = self.body_bytes + self.rope_bytes + self.scales
        # Rows lie one after the other, and their float parts must start at a multiple of their own width.
        return used + -used % (4 if "fp32" in (self.body_format, self.rope_format) else 2)


def pack(x: Tensor, layout: EntryLayout) -> Tensor:
    """Float [..., size] to uint8 [..., layout.nbytes]."""
    body, rope = x.float().split((layout.body, layout.rope), dim=-1)
    parts = []
    scales = None
    if layout.body_format in _SCALED:
        _, grid_max, floor = _SCALED[layout.body_format]
        scales = formats.e8m0_from_amax(formats.block_amax(body, layout.block), grid_max, floor)
        grid = body / formats.per_element(formats.e8m0_to_float(scales), layout.block, layout.body)
        if layout.body_format == "fp8":
            parts.append(grid.clamp(-grid_max, grid_max).to(torch.float8_e4m3fn).view(torch.uint8))
        else:
            parts.append(formats.pack_e2m1(formats.round_to_e2m1(grid)))
    else:
        parts.append(_bytes_of(body, layout.body_format))
    if layout.rope:
        parts.append(_bytes_of(rope, layout.rope_format))
    if scales is not None:
        parts.append(scales)
    packed = torch.cat(parts, dim=-1)
    return torch.nn.functional.pad(packed, (0, layout.nbytes - packed.shape[-1]))


def unpack(packed: Tensor, layout: EntryLayout) -> Tensor:
    """Uint8 [..., layout.nbytes] to float32 [..., size]."""
    raw = packed[..., : layout.body_bytes]
    if layout.body_format in _SCALED:
        grid = formats.unpack_e4m3(raw) if layout.body_format == "fp8" else formats.unpack_e2m1(raw)
        body = grid * formats.per_element(_scales(packed, layout), layout.block, layout.body)
    else:
        body = _floats_of(raw, layout.body_format)
    return torch.cat((body, _rope(packed, layout)), dim=-1) if layout.rope else body


def write_ring(ring: Tensor, rows: Tensor, ends: list[int]) -> None:
    """Write rows [B, n, ...], n at most the capacity, into ring [B, capacity, ...]: the row of position p at p modulo
    the capacity. ``ends``: one past the last position, of each sequence."""
    count, capacity = rows.shape[1], ring.shape[1]
    after = torch.tensor(ends, device=ring.device).unsqueeze(-1)
    places = (after - count + torch.arange(count, device=ring.device)) % capacity
    ring[torch.arange(len(ends), device=ring.device).unsqueeze(-1), places] = rows


def _scales(packed: Tensor, layout: EntryLayout) -> Tensor:
    begin = layout.body_bytes + layout.rope_bytes
    return formats.e8m0_to_float(packed[..., begin : begin + layout.scales])


def _rope(packed: Tensor, layout: EntryLayout) -> Tensor:
    return _floats_of(packed[..., layout.body_bytes : layout.body_bytes + layout.rope_bytes], layout.rope_format)


def _bytes_of(x: Tensor, fmt: str) -> Tensor:
    return x.to(_PLAIN[fmt]).contiguous().view(torch.uint8)


def _floats_of(raw: Tensor, fmt: str) -> Tensor:
    return raw.contiguous().view(_PLAIN[fmt]).float()
