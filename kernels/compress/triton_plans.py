"""Compiled forms of the pooling kernels: 131,072 tokens of DeepSeek-V4's CSA (overlap) and HCA layers and of its index
keys, in training, for packed documents and for a cache."""

from __future__ import annotations

from functools import partial
from typing import Any

from kernels.cache_io import EntryLayout
from kernels.compress.triton import (
    CHUNK_BACKWARD_TILES,
    CHUNK_TILES,
    DOCUMENTS,
    FINISH_BACKWARD_TILES,
    FINISH_TILES,
    FUSED_BACKWARD_TILES,
    FUSED_TILES,
    RING,
    WHOLE,
    block_constants,
    finish_constants,
    is_fused,
    row_layout_constants,
)
from kernels.triton_support.plans import Plan, Work
from kernels.triton_support.tiles import Tiles

TOKENS, ROPE = 131072, 64
MAIN, INDEX = EntryLayout(448, "fp8", ROPE), EntryLayout(128, "fp4")
_FORWARD = (
    "rows ring places starts bias norm_weight cos sin page_table out N S skipped capacity angle_rows pages page_rows "
    "norm_eps"
)
_FINISH = "pooled places norm_weight cos sin page_table out N S angle_rows pages page_rows norm_eps"
_BACKWARD = (
    "rows places starts bias norm_weight cos sin grad_out grad_rows bias_parts weight_parts N S skipped total "
    "angle_rows norm_eps"
)
_FINISH_BACKWARD = "pooled norm_weight cos sin grad_out grad_pooled weight_parts N total angle_rows norm_eps"
_SIZES = {"N": "i32:16", "S": "i32:16", "skipped": "i32", "total": "i32:16", "capacity": "i32", "angle_rows": "i32"}
_TYPES = {**_SIZES, "pages": "i32", "page_rows": "i32:16", "norm_eps": "fp32"}
_SOURCE_TYPES = {
    WHOLE: {},
    DOCUMENTS: {"places": "*i64:16", "starts": "*i8:16"},
    RING: {"places": "*i64:16", "page_table": "*i64:16", "out": "*u8:16"},
}


def _arguments(names: str, source: int = WHOLE) -> dict[str, str]:
    """Return the types of arguments, by default pointers to float32."""
    types = {**_TYPES, **_SOURCE_TYPES[source]}
    return {name: types.get(name, "*fp32:16") for name in names.split()}


def _plans(kind: str, layout: EntryLayout, m: int, overlap: bool) -> list[Plan]:
    c, fused = layout.size, is_fused(m, layout.size)
    row = 4.0 * c  # bytes of an entry
    rows = 2 * m * (1 + overlap) * row  # bytes of the projections, for an entry
    bias = rows / 2
    steps = {"C": c, "R": ROPE // 2, "HADAMARD": layout == INDEX}
    pooling = {**steps, "M": m, "OVERLAP": overlap, "FINISH": fused}
    found = []

    def add(
        name: str, tiles: Tiles, arguments: dict[str, str], constants: dict[str, Any], moved: float, read: float
    ) -> None:
        """Add a plan. ``moved`` and ``read`` are the bytes per entry that cross device memory and that are read through
        the L2 cache."""
        kernel = name.partition(",")[0]
        blocks = partial(finish_constants, c) if kernel.startswith("finish") else partial(block_constants, m, c)
        work = Work(0.0, TOKENS // m * moved, TOKENS // m * read, target="75% of bandwidth")
        found.append(
            Plan(f"compress.{name} ({kind})", kernel, arguments, constants, tiles, work=work, tile_constants=blocks)
        )

    for suffix, source, stored, size in (
        ("", WHOLE, EntryLayout(c, "fp32"), row),
        (", documents", DOCUMENTS, EntryLayout(c, "fp32"), row),
        (", cached", RING, layout, layout.nbytes),
    ):
        forward, finish = (_arguments(names, source) for names in (_FORWARD, _FINISH))
        constants = {"SOURCE": source, **row_layout_constants(stored)}
        if fused:
            add(f"forward{suffix}", FUSED_TILES, forward, {**pooling, **constants}, rows + size, rows + bias + row)
        else:
            forward["out"] = finish["pooled"]
            add(f"forward{suffix}", CHUNK_TILES, forward, {**pooling, **constants}, rows + row, rows + bias)
            add(f"finish{suffix}", FINISH_TILES, finish, {**steps, "M": m, **constants}, row + size, 2 * row)
    tiles = FUSED_BACKWARD_TILES if fused else CHUNK_BACKWARD_TILES
    parts = (bias + row * fused) / tiles["sm_90"][0].sizes["ENTRIES"]
    for suffix, source in (("", WHOLE), (", documents", DOCUMENTS)):
        arguments, constants = _arguments(_BACKWARD, source), {**pooling, "SOURCE": source}
        add(f"backward{suffix}", tiles, arguments, constants, 2 * rows + row + parts, rows + bias + 2 * row)
    if not fused:
        parts = row / FINISH_BACKWARD_TILES["sm_90"][0].sizes["ENTRIES"]
        add("finish_backward", FINISH_BACKWARD_TILES, _arguments(_FINISH_BACKWARD), steps, 3 * row + parts, 3 * row)
    return found


PLANS = [*_plans("csa", MAIN, 4, True), *_plans("index", INDEX, 4, True), *_plans("hca", MAIN, 128, False)]
