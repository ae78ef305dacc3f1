"""Compiled forms of the selection kernels: 2,048 queries of DeepSeek-V4-Flash at 131,072 tokens."""

from __future__ import annotations

from kernels.cache_io import EntryLayout
from kernels.index_topk.triton import ORDER_TILES, SCORE_TILES, SELECT_TILES, score_constants
from kernels.triton_support.plans import Plan, Work
from kernels.triton_support.platform import NVIDIA

QUERIES, HEADS, DIMS, ENTRIES, K = 2048, 64, 128, 32768, 512
LAYOUT = EntryLayout(DIMS, "fp4")
_SCORES = QUERIES * ENTRIES

PLANS = [
    Plan(
        "index_topk.score",
        "score",
        {
            "query": "*bf16:16", "head_weights": "*fp32:16", "storage": "*u8:16", "page_table": "*i64:16",
            "firsts": "*i64:16", "ends": "*i64:16", "scores": "*fp32:16", "begin": "i32:16", "count": "i32:16",
            "S": "i32:16", "h": "i32:16", "page_size": "i32:16", "P": "i32:16", "visible_stride": "i32:16",
            "n": "i32:16",
        },
        {**score_constants(LAYOUT, HEADS), "HAS_FIRST": False, "ROUND": True, "UPCAST": False},
        SCORE_TILES,
        multiplies=True,
        copies_ahead=NVIDIA,
        work=Work(
            flops=2.0 * _SCORES * HEADS * DIMS,
            nbytes=4.0 * _SCORES + ENTRIES * LAYOUT.nbytes + 2.0 * QUERIES * HEADS * DIMS,
            cache_bytes=2.0 * QUERIES * HEADS * DIMS * ENTRIES / 128,
            vector_ops=3.0 * _SCORES * HEADS,
            target="45% of BF16 products",
        ),
    ),
    Plan(
        "index_topk.select",
        "select",
        {
            "scores": "*fp32:16", "indices": "*i32:16", "firsts": "*i64:16", "ends": "*i64:16", "best": "*fp32:16",
            "chosen": "*i32:16",
            "stride": "i32:16", "n": "i32:16", "segment": "i32:16", "k": "i32:16", "out_stride": "i32:16",
            "limit_stride": "i32:16", "limit_width": "i32:16", "begin": "i32:16",
        },
        {"HAS_INDICES": False, "HAS_FIRST": False, "WIDTH": K},
        SELECT_TILES,
        work=Work(0.0, 4.0 * _SCORES, cache_bytes=20.0 * _SCORES, vector_ops=60.0 * _SCORES),
    ),
    Plan(
        "index_topk.order",
        "order",
        {
            "best": "*fp32:16", "chosen": "*i32:16", "out": "*i64:16", "S": "i32:16", "begin": "i32:16",
            "count": "i32:16", "k": "i32:16",
        },
        {"WIDTH": K},
        ORDER_TILES,
    ),
]  # fmt: skip
