"""Compiled forms of the experts' products: 32,768 tokens of DeepSeek-V4-Flash, with 6 of 256 experts each."""

from __future__ import annotations

from kernels.expert_dispatch.triton import TILES
from kernels.triton_support.plans import Plan, Work
from kernels.triton_support.platform import NVIDIA

ROWS, EXPERTS, WIDTH, INNER = 32768 * 6, 256, 4096, 2048
_B = "*bf16:16"
_LISTS = {"offsets": "*i64:16"}
_FLOPS = 2.0 * ROWS * WIDTH * INNER
_NBYTES = 2.0 * (ROWS * (WIDTH + INNER) + EXPERTS * WIDTH * INNER)
_TILE = TILES["sm_90"][0].sizes
_CACHE_BYTES = _FLOPS / _TILE["BLOCK_M"] + _FLOPS / _TILE["BLOCK_N"]
"""Every operand is read once per tile of the other one."""
_TARGET = "60% of products"


def _multiply(kind: str, transposed: bool) -> Plan:
    return Plan(
        f"expert_dispatch.multiply ({kind})",
        "multiply",
        {
            "rows": _B, "stack": _B, "out": _B, **_LISTS, "experts": "*i64:16", "first_rows": "*i64:16", "N": "i32:16",
            "K": "i32:16",
        },
        {"TRANSPOSED": transposed, "UPCAST": False},
        TILES,
        multiplies=True,
        copies_ahead=NVIDIA,
        work=Work(_FLOPS, _NBYTES, _CACHE_BYTES, target=_TARGET),
    )  # fmt: skip


PLANS = [
    _multiply("forward", False),
    _multiply("gradient of rows", True),
    Plan(
        "expert_dispatch.multiply_rows",
        "multiply_rows",
        {"left": _B, "right": _B, "out": _B, **_LISTS, "M": "i32:16", "N": "i32:16"},
        {"UPCAST": False},
        TILES,
        multiplies=True,
        copies_ahead=NVIDIA,
        work=Work(_FLOPS, _NBYTES, _CACHE_BYTES, target=_TARGET),
    ),
]
