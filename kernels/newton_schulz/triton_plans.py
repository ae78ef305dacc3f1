"""Compiled form of the symmetric product: 16 matrices of 2,048 x 2,048."""

from __future__ import annotations

from kernels.newton_schulz.triton import TILES, blocks_of
from kernels.triton_support.plans import Plan, Work
from kernels.triton_support.platform import NVIDIA

ROWS, BATCH = 2048, 16
_TILE = TILES["sm_90"][0]
_M, _N = _TILE.sizes["BLOCK_M"], _TILE.sizes["BLOCK_N"]
_BLOCKS = BATCH * blocks_of(ROWS, _TILE)

PLANS = [
    Plan(
        "newton_schulz.symmetric",
        "symmetric",
        {
            "left": "*bf16:16", "right": "*bf16:16", "added": "*bf16:16", "out": "*bf16:16", "R": "i32:16",
            "C": "i32:16", "alpha": "fp32", "beta": "fp32",
        },
        {"HAS_ADDED": True, "PRECISION": "ieee", "UPCAST": False},
        TILES,
        multiplies=True,
        copies_ahead=NVIDIA,
        max_spills={"sm_90": 48, "sm_100": 120},
        work=Work(
            flops=_BLOCKS * 2.0 * _M * _N * ROWS,
            nbytes=BATCH * 2.0 * 3 * ROWS**2,
            cache_bytes=_BLOCKS * 2.0 * (_M + _N) * ROWS,
            target="60% of products",
        ),
    )
]  # fmt: skip
