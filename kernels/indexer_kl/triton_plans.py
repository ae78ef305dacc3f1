"""Compiled forms of the indexer's loss: 4,096 queries of DeepSeek-V4-Flash, with all of 1,024 entries or 512 chosen
ones."""

from __future__ import annotations

from kernels.indexer_kl.reference import MIN_MASS
from kernels.indexer_kl.triton import KEY_TILES, TILES
from kernels.triton_support.plans import Plan, Work
from kernels.triton_support.platform import NVIDIA
from kernels.triton_support.tiles import Tile

QUERIES, HEADS, DIMS, ENTRIES, CHOSEN = 4096, 64, 128, 1024, 512
_CONSTANTS = {"C": DIMS, "DIMS": DIMS, "HEADS": HEADS, "UPCAST": False}
_INPUTS = {
    "query": "*bf16:16", "keys": "*bf16:16", "head_weights": "*fp32:16", "begin_query": "i32:16", "count": "i32:16",
    "S": "i32:16", "T": "i32:16", "h": "i32:16",
}  # fmt: skip
_QUERY_BYTES = 2.0 * QUERIES * HEADS * DIMS


def _divergence(kind: str, width: float, is_chosen: bool) -> Plan:
    """Return the plan with gradients. A query reads ``width`` keys on average."""
    pairs = QUERIES * width
    product = 2.0 * HEADS * DIMS * pairs
    return Plan(
        f"indexer_kl.divergence ({kind})",
        "divergence",
        {
            **_INPUTS, "mass": "*fp32:16", "chosen": "*i32:16", "firsts": "*i32:16", "ends": "*i32:16",
            "value": "*fp32:16", "gradient": "*fp32:16", "grad_query": "*fp32:16", "grad_keys": "*fp32:16",
            "grad_weights": "*fp32:16", "width": "i32:16", "range_stride": "i32:16",
        },
        {**_CONSTANTS, "HAS_CHOSEN": is_chosen, "STORE": not is_chosen, "ADD": is_chosen, "MIN_MASS": MIN_MASS},
        TILES,
        multiplies=True,
        copies_ahead=NVIDIA,
        max_spills={"sm_90": 16, "sm_100": 112} if is_chosen else {},
        work=Work(
            # Scores twice and the gradient of the query; that of chosen keys besides.
            flops=(3 + is_chosen) * product,
            nbytes=3 * _QUERY_BYTES + 8.0 * pairs,
            cache_bytes=2.0 * 2.0 * DIMS * pairs,
            atomic_bytes=4.0 * DIMS * pairs * is_chosen,
            loops=lambda tile: pairs / tile.sizes["BLOCK_N"],
        ),
    )  # fmt: skip


def _key_bytes(tile: Tile) -> float:
    """Return the bytes of queries that all tiles of keys read: half of them, because the mask is causal."""
    return _QUERY_BYTES * ENTRIES / tile.sizes["BLOCK_N"] / 2


PLANS = [
    _divergence("all entries", ENTRIES / 2, False),
    _divergence("chosen entries", CHOSEN, True),
    Plan(
        "indexer_kl.key_gradients",
        "key_gradients",
        {
            **_INPUTS, "gradient": "*fp32:16", "starts": "*i32:16", "stops": "*i32:16", "parts": "*fp32:16",
            "bound_stride": "i32:16",
        },
        _CONSTANTS,
        KEY_TILES,
        multiplies=True,
        copies_ahead=NVIDIA,
        work=Work(
            flops=2 * 2.0 * HEADS * DIMS * QUERIES * ENTRIES / 2,
            nbytes=_QUERY_BYTES + 4.0 * QUERIES * ENTRIES / 2,
            cache_bytes=_key_bytes(KEY_TILES["sm_90"][0]),
            loops=lambda tile: QUERIES * ENTRIES / 2 / tile.sizes["BLOCK_N"],
        ),
    ),
]  # fmt: skip
