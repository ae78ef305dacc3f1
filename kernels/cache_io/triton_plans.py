"""Compiled forms of the packing kernels: 65,536 entries of DeepSeek-V4."""

from __future__ import annotations

from kernels.cache_io.layout import EntryLayout
from kernels.cache_io.triton import PACK_TILES, ROUND_TILES, UNPACK_TILES, layout_constants, pack_constants
from kernels.triton_support.plans import Plan, Work

ROWS = 65536
LAYOUT = EntryLayout(448, "fp8", 64)
INDEX_LAYOUT = EntryLayout(128, "fp4")

PLANS = [
    *(
        Plan(
            f"cache_io.pack ({layout.body_format})",
            "pack",
            {"x": "*fp32:16", "packed": "*u8:16", "R": "i32:16", "GROUPS": "i32"},
            pack_constants(layout),
            PACK_TILES,
            work=Work(0.0, ROWS * (4.0 * layout.size + layout.nbytes), target="75% of bandwidth"),
        )
        for layout in (LAYOUT, INDEX_LAYOUT)
    ),
    Plan(
        "cache_io.unpack (fp8)",
        "unpack",
        {"packed": "*u8:16", "out": "*fp32:16", "R": "i32:16"},
        {"SIZE": LAYOUT.size, **layout_constants(LAYOUT)},
        UNPACK_TILES,
        work=Work(0.0, ROWS * (4.0 * LAYOUT.size + LAYOUT.nbytes), target="75% of bandwidth"),
    ),
    *(
        Plan(
            f"cache_io.round_values ({fmt})",
            "round_values",
            {"x": "*bf16:16", "out": "*bf16:16", "R": "i32:16"},
            {"SIZE": 512, "FORMAT": code, "BLOCK": block, "PAD": block},
            ROUND_TILES,
            work=Work(0.0, ROWS * 2.0 * 2 * 512, target="75% of bandwidth"),
        )
        for fmt, code, block in (("fp8", 2, 64), ("fp4", 3, 32))
    ),
]
