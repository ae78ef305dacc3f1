"""Compiled forms of the decoding kernels: an HCA layer of DeepSeek-V4-Flash at a million tokens, 16 sequences."""

from __future__ import annotations

from kernels.cache_io import EntryLayout
from kernels.paged_attention.triton import COMBINE_TILES, TILES, row_constants
from kernels.triton_support.plans import Plan, Work

BATCH, HEADS, ENTRIES, WINDOW = 16, 64, 8192, 128
LAYOUT = EntryLayout(448, "fp8", 64)
_KEYS = ENTRIES + WINDOW
_LOGITS = BATCH * HEADS * _KEYS

PLANS = [
    Plan(
        "paged_attention.partial_attention",
        "partial_attention",
        {
            "query": "*bf16:16", "rows": "*u8:16", "offsets": "*i64:16", "first": "*i64:16", "storage": "*u8:16",
            "page_table": "*i64:16", "chosen": "*i64:16", "visible": "*i64:16", "parts": "*fp32:16",
            "stats": "*fp32:16", "S": "i32", "H": "i32:16", "R": "i32:16", "window": "i32:16", "offset_stride": "i32",
            "first_stride": "i32", "page_size": "i32:16", "P": "i32:16", "K": "i32:16", "visible_stride": "i32",
            "splits": "i32", "scale": "fp32",
        },
        {
            **row_constants(LAYOUT), "VALUES": 512, "HAS_WINDOW": True, "HAS_ENTRIES": True, "HAS_CHOSEN": False,
            "UPCAST": False,
        },
        TILES,
        multiplies=True,
        max_spills={"sm_80": 32, "sm_90": 984, "sm_100": 80},
        work=Work(
            flops=4.0 * _LOGITS * LAYOUT.size,
            nbytes=float(BATCH * _KEYS * LAYOUT.nbytes),
            loops=lambda tile: BATCH * HEADS / tile.sizes["BLOCK_H"] * _KEYS / tile.sizes["BLOCK_N"],
            target="70% of bandwidth",
        ),
    ),
    Plan(
        "paged_attention.combine",
        "combine",
        {
            "parts": "*fp32:16", "stats": "*fp32:16", "sink": "*fp32:16", "out": "*fp32:16", "rows": "i32:16",
            "H": "i32:16", "splits": "i32",
        },
        {"VALUES": 512, "VALUES_PAD": 512},
        COMBINE_TILES,
    ),
]  # fmt: skip
