"""Packing of cache entries in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import formats
from kernels.cache_io.layout import SCALED_FORMATS, EntryLayout
from kernels.cache_io.pages import Pages

_FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PACK_GRID = {
    "e4m3": lambda x: x.clamp(-formats.E4M3_MAX, formats.E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8),
    "e2m1": lambda x: formats.pack_e2m1(formats.round_to_e2m1(x)),
}
_UNPACK_GRID = {"e4m3": formats.unpack_e4m3, "e2m1": formats.unpack_e2m1}


def pack(x: Tensor, layout: EntryLayout) -> Tensor:
    """Implement :func:`kernels.cache_io.pack`."""
    body, rope = x.float().split((layout.body, layout.rope), dim=-1)
    parts = []
    scales = None
    if layout.body_format in SCALED_FORMATS:
        own = SCALED_FORMATS[layout.body_format]
        exponents = formats.e8m0_from_amax(formats.block_amax(body, layout.block), own.max, own.floor)
        values = formats.e8m0_to_float(exponents)
        parts.append(_PACK_GRID[own.grid](body / formats.per_element(values, layout.block, layout.body)))
        scales = exponents if layout.scale_bytes == 1 else _to_bytes(values, "fp32")
    else:
        parts.append(_to_bytes(body, layout.body_format))
    if layout.rope:
        parts.append(_to_bytes(rope, layout.rope_format))
    if scales is not None:
        gap = layout.scale_offset - layout.body_bytes - layout.rope_bytes
        parts.append(torch.nn.functional.pad(scales, (gap, 0)))
    packed = torch.cat(parts, dim=-1)
    return torch.nn.functional.pad(packed, (0, layout.nbytes - packed.shape[-1]))


def unpack(packed: Tensor, layout: EntryLayout) -> Tensor:
    """Implement :func:`kernels.cache_io.unpack`."""
    raw = packed[..., : layout.body_bytes]
    if layout.body_format in SCALED_FORMATS:
        grid = _UNPACK_GRID[SCALED_FORMATS[layout.body_format].grid](raw)
        body = grid * formats.per_element(_unpack_scales(packed, layout), layout.block, layout.body)
    else:
        body = _to_floats(raw, layout.body_format)
    return torch.cat((body, _unpack_rope(packed, layout)), dim=-1) if layout.rope else body


def write_ring(ring: Tensor, rows: Tensor, first: Tensor) -> None:
    """Implement :func:`kernels.cache_io.write_ring`."""
    slots = (first.unsqueeze(-1) + torch.arange(rows.shape[1], device=ring.device)) % ring.shape[1]
    ring[torch.arange(len(ring), device=ring.device).unsqueeze(-1), slots] = rows


def write_pages(x: Tensor, layout: EntryLayout, pages: Pages, first: Tensor, last: Tensor) -> None:
    """Implement :func:`kernels.cache_io.write_pages`."""
    store_rows(pack(x.detach(), layout), pages, first, last)


def store_rows(packed: Tensor, pages: Pages, first: Tensor, last: Tensor) -> None:
    """Write the first ``last - first`` rows of every sequence of packed uint8 [B, n, nbytes] to its pages.

    Shapes do not depend on the counts, so this does not synchronize. Surplus rows are replaced by a sequence's last
    one, or, if it has none, by the stored row of its next entry.
    """
    B, n, nbytes = packed.shape
    counts = (last - first).expand(B).unsqueeze(-1)
    columns = torch.arange(n, device=packed.device).minimum(counts - 1).clamp(min=0)  # [B, n]
    entries = first.unsqueeze(-1) + columns
    rows = packed.gather(1, columns.unsqueeze(-1).expand(-1, -1, nbytes))
    rows = torch.where(counts.unsqueeze(-1) > 0, rows, pages.gather(entries))
    pages.storage.index_copy_(0, pages.storage_rows(entries).flatten(), rows.flatten(0, 1))


def _unpack_scales(packed: Tensor, layout: EntryLayout) -> Tensor:
    raw = packed[..., layout.scale_offset :][..., : layout.scales * layout.scale_bytes]
    return formats.e8m0_to_float(raw) if layout.scale_bytes == 1 else _to_floats(raw, "fp32")


def _unpack_rope(packed: Tensor, layout: EntryLayout) -> Tensor:
    return _to_floats(packed[..., layout.body_bytes : layout.body_bytes + layout.rope_bytes], layout.rope_format)


def _to_bytes(x: Tensor, fmt: str) -> Tensor:
    return x.to(_FLOAT_DTYPES[fmt]).contiguous().view(torch.uint8)


def _to_floats(raw: Tensor, fmt: str) -> Tensor:
    return raw.contiguous().view(_FLOAT_DTYPES[fmt]).float()
