"""Packing and rounding of cache entries by Triton kernels, with the same bits as the reference."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from kernels import formats
from kernels.autocast import detached
from kernels.cache_io import reference
from kernels.cache_io.layout import SCALED_FORMATS, EntryLayout
from kernels.cache_io.pages import Pages
from kernels.triton_support.platform import ARCHITECTURES, require_choice, require_device
from kernels.triton_support.tiles import Tile, Tiles, launch_best, padded_dim, power_of_two

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT_GROUP = 64
"""Dims per program of formats without scales."""

PACK_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"ROWS": 16}),),
    **{name: (Tile(4, 1, {"ROWS": 16}), Tile(4, 1, {"ROWS": 64})) for name in ARCHITECTURES},
}
UNPACK_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"ROWS": 8}),),
    **{name: (Tile(4, 1, {"ROWS": 8}), Tile(4, 1, {"ROWS": 16})) for name in ARCHITECTURES},
}
ROUND_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"ROWS": 16}),),
    **{name: (Tile(4, 1, {"ROWS": 64}), Tile(4, 1, {"ROWS": 128})) for name in ARCHITECTURES},
}


def layout_constants(layout: EntryLayout) -> dict[str, int]:
    """Return a layout as compile-time constants of kernels that read packed rows."""
    body, body_format, rope, rope_format = layout.spec
    return {
        "NBYTES": layout.nbytes,
        "BODY": body,
        "FORMAT": body_format,
        "BODY_BYTES": layout.body_bytes,
        "BODY_PAD": padded_dim(body),
        "ROPE": rope,
        "ROPE_FORMAT": rope_format,
        "ROPE_PAD": padded_dim(rope),
        "BLOCK": layout.block if layout.scales else 1,
        "SCALES": layout.scales,
        "SCALE_OFFSET": layout.scale_offset,
    }


def pack_constants(layout: EntryLayout) -> dict[str, int]:
    """Return a layout as compile-time constants of the packing kernel."""
    constants = {"SIZE": layout.size, **layout_constants(layout)}
    del constants["BODY_PAD"]
    width = layout.block if layout.scales else _FLOAT_GROUP
    return {**constants, "PAD": max(2, power_of_two(width))}


def pack(x: Tensor, layout: EntryLayout) -> Tensor:
    """Implement :func:`kernels.cache_io.pack`."""
    require_device("cache_io", x)
    require_choice("cache_io", "dtypes", x.dtype, DTYPES)
    kernels = importlib.import_module("kernels.cache_io.triton_kernels")
    rows = _float_rows(x, layout.size)
    constants = pack_constants(layout)
    groups = layout.scales or -(-layout.body // constants["PAD"])

    def run(tile: Tile) -> Tensor:
        packed = torch.empty(len(rows), layout.nbytes, dtype=torch.uint8, device=x.device)
        grid = (-(-len(rows) // tile.sizes["ROWS"]), groups + 1)
        kernels.pack[grid](rows, packed, len(rows), groups, **constants, **tile.options)
        return packed

    if not len(rows):
        return torch.empty(*x.shape[:-1], layout.nbytes, dtype=torch.uint8, device=x.device)
    packed = launch_best("cache_io.pack", PACK_TILES, (len(rows), layout.spec), x.device, run)
    return packed.view(*x.shape[:-1], layout.nbytes)


def unpack(packed: Tensor, layout: EntryLayout) -> Tensor:
    """Implement :func:`kernels.cache_io.unpack`."""
    require_device("cache_io", packed)
    kernels = importlib.import_module("kernels.cache_io.triton_kernels")
    rows = packed.contiguous().view(-1, layout.nbytes)

    def run(tile: Tile) -> Tensor:
        out = torch.empty(len(rows), layout.size, dtype=torch.float32, device=packed.device)
        grid = (-(-len(rows) // tile.sizes["ROWS"]),)
        kernels.unpack[grid](rows, out, len(rows), SIZE=layout.size, **layout_constants(layout), **tile.options)
        return out

    if not len(rows):
        return torch.empty(*packed.shape[:-1], layout.size, device=packed.device)
    out = launch_best("cache_io.unpack", UNPACK_TILES, (len(rows), layout.spec), packed.device, run)
    return out.view(*packed.shape[:-1], layout.size)


def write_pages(x: Tensor, layout: EntryLayout, pages: Pages, first: Tensor, last: Tensor) -> None:
    """Implement :func:`kernels.cache_io.write_pages`."""
    reference.store_rows(pack(x, layout), pages, first, last)


def round_to_format(x: Tensor, fmt: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Implement :func:`kernels.quantize.round_to_format`. Formats without scales are one cast of PyTorch."""
    require_device("quantize", x)
    if fmt not in SCALED_FORMATS:
        return (x if fmt == "fp32" else formats.round_to_bf16(x.float())).detach().to(dtype)
    require_choice("quantize", "dtypes", x.dtype, DTYPES)
    require_choice("quantize", "dtypes of results", dtype, DTYPES[:2])
    kernels = importlib.import_module("kernels.cache_io.triton_kernels")
    layout = EntryLayout(x.shape[-1], fmt)
    rows = _float_rows(x, layout.size)

    def run(tile: Tile) -> Tensor:
        out = torch.empty(rows.shape, dtype=dtype, device=x.device)
        grid = (-(-len(rows) // tile.sizes["ROWS"]), layout.scales)
        kernels.round_values[grid](
            rows, out, len(rows), SIZE=layout.size, FORMAT=layout.spec[1], BLOCK=layout.block,
            PAD=max(2, power_of_two(layout.block)), **tile.options,
        )  # fmt: skip
        return out

    if not rows.numel():
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    return launch_best("cache_io.round_values", ROUND_TILES, (tuple(rows.shape), fmt), x.device, run).view(x.shape)


def _float_rows(x: Tensor, size: int) -> Tensor:
    return detached(x).contiguous().view(-1, size)


# A single indexed assignment, which is one kernel already.
write_ring = reference.write_ring
