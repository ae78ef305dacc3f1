"""Compiled forms of the pooling kernels: 131,072 tokens of DeepSeek-V4's CSA (overlap) and HCA layers."""

from __future__ import annotations

from kernels.compress.triton import TILES, block_constants
from kernels.triton_support.plans import Plan, Work
from kernels.triton_support.tiles import Tile

TOKENS, DIMS = 131072, 512
_SIZES = {"n": "i32:16", "W": "i32:16", "C": "i32:16", "skipped": "i32"}
_F = "*fp32:16"


def _plans(kind: str, m: int, overlap: bool) -> list[Plan]:
    arguments = {"rows": _F, "bias": _F, "starts": _F, "out": _F, **_SIZES, "m": "i32:16" if m % 16 == 0 else "i32"}
    constants = {"OFFSET_IS_C": overlap, "HAS_STARTS": False}

    def blocks(tile: Tile) -> dict[str, int]:
        return block_constants(m, DIMS, tile.sizes["elements"])

    nbytes = 4.0 * TOKENS * DIMS * 2 * (1 + overlap)
    target = "75% of bandwidth"
    return [
        Plan(
            f"compress.forward ({kind})",
            "forward",
            arguments,
            constants,
            TILES,
            work=Work(0.0, nbytes, target=target),
            tile_constants=blocks,
        ),
        Plan(
            f"compress.backward ({kind})",
            "backward",
            {**arguments, "grad_out": _F, "grad_rows": _F},
            constants,
            TILES,
            work=Work(0.0, 2 * nbytes, target=target),
            tile_constants=blocks,
        ),
    ]


PLANS = [*_plans("csa", 4, True), *_plans("hca", 128, False)]
