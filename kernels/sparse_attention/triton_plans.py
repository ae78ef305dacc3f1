"""Compiled forms of the attention kernels, at the sizes of a CSA layer of DeepSeek-V4-Flash and 4,096 tokens."""

from __future__ import annotations

from dataclasses import replace

from kernels.sparse_attention.triton import BACKWARD_TILES, FORWARD_TILES, KEY_STAGES, MASS_TILES, SUM_TILES
from kernels.triton_support.plans import Plan, Work
from kernels.triton_support.platform import NVIDIA
from kernels.triton_support.tiles import Tile

TOKENS, HEADS, DIMS, CHOSEN, WINDOW = 4096, 64, 512, 512, 128
_KEYS = CHOSEN + WINDOW
_LOGITS = TOKENS * HEADS * _KEYS
_ROWS = "*bf16:16"
_VISIBILITY = {"chosen": "*i32:16", "firsts": "*i32:16", "ends": "*i32:16"}
_SIZES = {"S": "i32:16", "H": "i32:16", "T": "i32:16", "K": "i32:16", "range_stride": "i32:16"}
_QUERY_BYTES = 2.0 * TOKENS * HEADS * DIMS
_FLAGS = {"D": DIMS, "HAS_WINDOW": True, "HAS_REACH": False, "MODE": 1, "UPCAST": False}


def _attention(**more: str) -> dict[str, str]:
    return {
        "query": _ROWS, "window_kv": _ROWS, "entries": _ROWS, **_VISIBILITY, **_SIZES, "reach": "*i32:16",
        "log_sum": "*fp32:16", "past": "i32", "window": "i32:16", "scale": "fp32", **more,
    }  # fmt: skip


def _blocks(tile: Tile) -> dict[str, int]:
    """Return the block sizes of a program for chosen entries: heads of one query."""
    return {"BLOCK_Q": 1, "BLOCK_H": tile.sizes["rows"], "BLOCK_N": tile.sizes["BLOCK_N"]}


def _backward(kind: str, passes: int, of_query: bool, of_keys: bool, products: int) -> Plan:
    """Return the plan of a pass on the architectures with that number of passes. An H100 has two."""
    tiles = {name: tuple(t for t in choices if t.sizes["passes"] == passes) for name, choices in BACKWARD_TILES.items()}
    if not of_query:
        tiles = {name: tuple(replace(t, stages=KEY_STAGES) for t in choices) for name, choices in tiles.items()}
    return Plan(
        f"sparse_attention.{kind}",
        "backward",
        _attention(
            grad_out=_ROWS, inner="*fp32:16", grad_query=_ROWS, grad_window="*fp32:16", grad_entries="*fp32:16",
            parts="*fp32:16", begin_query="i32:16", window_slots="i32:16", slots="i32:16", factor="fp32",
        ),
        {**_FLAGS, "ATOMIC": True, "OF_QUERY": of_query, "OF_KEYS": of_keys},
        {name: choices for name, choices in tiles.items() if choices},
        multiplies=True,
        max_spills={"sm_90": 960},
        work=Work(
            flops=2.0 * products * _LOGITS * DIMS,
            nbytes=(2.0 + of_query) * _QUERY_BYTES,
            cache_bytes=2.0 * TOKENS * _KEYS * DIMS,
            atomic_bytes=4.0 * TOKENS * _KEYS * DIMS * of_keys,
            vector_ops=16.0 * _LOGITS,
            target="130 TFLOP/s, both passes" if passes == 2 else "",
        ),
        tile_constants=_blocks,
    )  # fmt: skip


PLANS = [
    Plan(
        "sparse_attention.forward",
        "forward",
        _attention(out=_ROWS, sink="*fp32:16"),
        _FLAGS,
        FORWARD_TILES,
        multiplies=True,
        copies_ahead=NVIDIA,
        max_spills={"sm_80": 96, "sm_90": 192},
        work=Work(
            flops=4.0 * _LOGITS * DIMS,
            nbytes=2 * _QUERY_BYTES,
            cache_bytes=2.0 * TOKENS * _KEYS * DIMS,
            vector_ops=30.0 * _LOGITS,
            target="300 TFLOP/s",
        ),
        tile_constants=_blocks,
    ),
    Plan(
        "sparse_attention.entry_mass",
        "entry_mass",
        {
            "query": _ROWS,
            "entries": _ROWS,
            **_VISIBILITY,
            **_SIZES,
            "log_sum": "*fp32:16",
            "mass": "*fp32:16",
            "begin_query": "i32:16",
            "count": "i32:16",
            "scale": "fp32",
        },
        {"D": DIMS, "MODE": 1, "UPCAST": False},
        MASS_TILES,
        multiplies=True,
        max_spills={"sm_90": 0},
        work=Work(
            flops=2.0 * TOKENS * HEADS * CHOSEN * DIMS,
            nbytes=_QUERY_BYTES + 4.0 * TOKENS * CHOSEN,
            cache_bytes=2.0 * TOKENS * DIMS * CHOSEN,
            vector_ops=14.0 * TOKENS * HEADS * CHOSEN,
        ),
        tile_constants=_blocks,
    ),
    _backward("backward", 1, True, True, 5),
    _backward("backward of queries", 2, True, False, 3),
    _backward("backward of keys", 2, False, True, 4),
    Plan(
        "sparse_attention.sum_parts",
        "sum_parts",
        {"parts": "*fp32:16", "order": "*i64:16", "offsets": "*i64:16", "target": "*fp32:16"},
        {"D": DIMS},
        SUM_TILES,
    ),
]
