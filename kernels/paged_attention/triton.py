"""Attention over the packed rows of a cache by Triton kernels: split over the keys, dequantized in registers.

Products are those of BF16 operands with float32 sums: exact for stored keys, while queries and attention weights are
rounded to BF16. On a GPU the backend therefore runs by default only where BF16 products are permitted: for queries in
16 bits or from weights in 16 bits, under autocast, or with ``torch.set_float32_matmul_precision("medium")``. It does
not synchronize, and the grid depends on capacities and not on lengths, as :mod:`model.decode_graphs` requires.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from kernels.autocast import product_dtype
from kernels.cache_io import EntryLayout
from kernels.cache_io.triton import layout_constants
from kernels.paged_attention.inputs import EntrySet, TokenRows
from kernels.sparse_attention.blocks import LOG2_E
from kernels.triton_support.platform import (
    ARCHITECTURES,
    check_selection,
    is_interpreting,
    multiprocessors,
    on_device_of,
    require_choice,
    require_device,
    require_shapes,
)
from kernels.triton_support.tiles import Tile, Tiles, launch_best, padded_dim, power_of_two

FORMATS = ("bf16", "fp8", "fp8_128", "fp4")
"""Formats of bodies whose values BF16 holds exactly."""
_PROGRAMS_PER_MULTIPROCESSOR = 2
MAX_PADDED_DIMS = 576
"""Maximum number of dims of a row, body and rope padded to powers of two: V3.2's rows of 512 and 64."""
_MAX_PIECE, _MAX_PIECES = 256, 3
_SHIFT = 2.0**80
"""Ratio of E4M3 values to their word-unpacked BF16 values: 2 ** (120 - _OFFSET); ``_OFFSET`` is defined in the kernels.
Exact for queries up to 2 ** 47 and entries up to 2 ** 95 in magnitude."""

TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"BLOCK_H": 16, "BLOCK_N": 16}),),
    "sm_80": (Tile(8, 1, {"BLOCK_H": 32, "BLOCK_N": 32}),),
    "sm_90": (
        Tile(4, 1, {"BLOCK_H": 64, "BLOCK_N": 32}),  # two programs per multiprocessor, at the price of spills
        Tile(8, 2, {"BLOCK_H": 64, "BLOCK_N": 64}),
        Tile(8, 1, {"BLOCK_H": 64, "BLOCK_N": 64}),
    ),
    "sm_100": (Tile(8, 1, {"BLOCK_H": 32, "BLOCK_N": 32}),),
    "gfx942": (Tile(4, 1, {"BLOCK_H": 16, "BLOCK_N": 32}),),
}
"""On sm_100 the sums of 64 heads do not fit the tensor memory beside their logits."""
COMBINE_TILES: Tiles = {name: (Tile(4, 1),) for name in ARCHITECTURES}


def supports(query: Tensor, layout: EntryLayout, weight_dtype: torch.dtype | None = None) -> bool:
    """Return whether the backend runs by default on a GPU for these queries, from weights of ``weight_dtype``."""
    narrow = {torch.bfloat16, torch.float16} & {product_dtype(query), weight_dtype}
    permits_bf16 = bool(narrow) or torch.get_float32_matmul_precision() == "medium"
    return permits_bf16 and not _fault(layout)


def _fault(layout: EntryLayout) -> str:
    """Return why a layout is not supported, or an empty string."""
    if layout.body_format not in FORMATS:
        return f"body formats {', '.join(FORMATS)}; found {layout.body_format}"
    if layout.rope and layout.rope_format != "bf16":
        return f"rope format bf16; found {layout.rope_format}"
    padded = power_of_two(layout.body) + (power_of_two(layout.rope) if layout.rope else 0)
    if padded > MAX_PADDED_DIMS:
        return f"at most {MAX_PADDED_DIMS} dims after padding; found {padded}"
    return ""


def _check_shapes(
    query: Tensor, tokens: TokenRows | None, entries: EntrySet | None, sink: Tensor, layout: EntryLayout
) -> None:
    """Raise ValueError unless all inputs have the sizes that the kernels read."""
    (B, S, H, _), name = query.shape, "paged_attention"
    require_shapes(name, query=(query, (B, S, H, layout.size)), sink=(sink, (H,)))
    if tokens is not None:
        several = ((B, 1),)
        require_shapes(
            name,
            rows=(tokens.rows, (B, tokens.rows.shape[1], layout.nbytes)),
            offsets=(tokens.offsets, several),
            first=(tokens.first, several),
        )
    if entries is not None:
        chosen = entries.chosen
        require_shapes(
            name,
            **entries.pages.shapes(B, layout.nbytes),
            chosen=(chosen, (B, S, 0 if chosen is None else chosen.shape[-1])),
            visible=(entries.visible, ((B, 1), S)),
        )


def row_constants(layout: EntryLayout) -> dict[str, Any]:
    """Return a layout as compile-time constants: the body's pieces, and whether it is unpacked by words."""
    constants: dict[str, Any] = layout_constants(layout)
    del constants["BODY_PAD"]
    pieces: list[int] = []
    rest = layout.body
    while rest > 0:
        width = 1 << (rest.bit_length() - 1)
        if len(pieces) == _MAX_PIECES - 1 or width < 16:
            width = padded_dim(rest)
        pieces.append(min(width, _MAX_PIECE))
        rest -= pieces[-1]
    words = layout.body_format == "fp8" and layout.nbytes % 4 == 0 and layout.body % 4 == 0
    widths = dict(zip(("P0", "P1", "P2"), (*pieces, 0, 0)))
    return {**constants, **widths, "WORDS": words, "SHIFT": _SHIFT if words else 1.0}


def paged_attention(
    query: Tensor,
    tokens: TokenRows | None,
    entries: EntrySet | None,
    sink: Tensor,
    layout: EntryLayout,
    window: int,
    scale: float,
    value_size: int,
) -> Tensor:
    """Implement :func:`kernels.paged_attention.paged_attention`, without gradients. Raises ValueError for unsupported
    inputs."""
    require_device("paged_attention", query)
    if fault := _fault(layout):
        raise ValueError(f"paged_attention: the triton backend supports {fault}")
    require_choice("paged_attention", "dtypes", query.dtype, (torch.float32, torch.bfloat16, torch.float16))
    kernels = importlib.import_module("kernels.paged_attention.triton_kernels")
    B, S, H, _ = query.shape
    _check_shapes(query, tokens, entries, sink, layout)
    constants = row_constants(layout)
    q = query.detach().float()
    if constants["WORDS"]:
        q = torch.cat((q[..., : layout.body] * constants["SHIFT"], q[..., layout.body :]), dim=-1)
    q = q.to(torch.float32 if is_interpreting() else torch.bfloat16).contiguous()
    integers = torch.zeros(1, dtype=torch.int64, device=query.device)
    nothing = integers.view(torch.uint8)
    rows, offsets, first = (tokens.rows, tokens.offsets, tokens.first) if tokens else (nothing, integers, integers)
    R = tokens.rows.shape[1] if tokens else 1
    storage, table, page_size = nothing, integers, 1
    chosen = visible = integers
    K = P = 0
    if entries is not None:
        pages = entries.pages
        storage, table, page_size, P = (
            pages.storage,
            pages.page_table.contiguous(),
            pages.page_size,
            pages.page_table.shape[1],
        )
        if entries.chosen is not None:
            chosen, K = entries.chosen.contiguous(), entries.chosen.shape[2]
            check_selection("paged_attention", chosen, P * page_size)
        else:
            assert entries.visible is not None
            visible = entries.visible.contiguous()
    has_chosen = entries is not None and entries.chosen is not None
    most = K if has_chosen else P * page_size
    constants |= {
        "VALUES": value_size,
        "HAS_WINDOW": tokens is not None,
        "HAS_ENTRIES": entries is not None,
        "HAS_CHOSEN": has_chosen,
        "UPCAST": is_interpreting(),
    }

    def run(tile: Tile) -> tuple[Tensor, Tensor, int]:
        rows_per_program = min(tile.sizes["BLOCK_H"], padded_dim(H))
        groups, size = -(-H // rows_per_program), tile.sizes["BLOCK_N"]
        tiles = -(-window // size) + -(-most // size)
        wanted = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(query.device) // (B * S * groups)
        splits = max(1, min(tiles, wanted))
        parts = torch.empty(splits, B * S * H, value_size, dtype=torch.float32, device=query.device)
        stats = torch.empty(splits, B * S * H, 2, dtype=torch.float32, device=query.device)
        kernels.partial_attention[(splits, B * S, groups)](
            q, rows.contiguous(), offsets, first, storage, table, chosen, visible, parts, stats,
            S, H, R, window, *(int(len(x) > 1) for x in (offsets, first)), page_size, P, K,
            S if len(visible) > 1 else 0, splits, scale * LOG2_E,
            **constants, BLOCK_H=rows_per_program, BLOCK_N=size, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return parts, stats, splits

    shape = (B * S, H, layout.spec, K, P * page_size)
    parts, stats, splits = launch_best("paged_attention.partial_attention", TILES, shape, query.device, run)
    out = torch.empty(B, S, H, value_size, dtype=torch.float32, device=query.device)
    bias = sink.detach().float() * LOG2_E
    with on_device_of(query):
        kernels.combine[(B * S * H,)](
            parts, stats, bias, out, B * S * H, H, splits, VALUES=value_size, VALUES_PAD=power_of_two(value_size)
        )
    return out
