"""Newton-Schulz iteration with symmetric products by a Triton kernel, which computes half of their blocks.

The iteration is that of :mod:`kernels.newton_schulz.eager`. Products with X, which are not symmetric, are PyTorch's.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.newton_schulz.eager import iterate
from kernels.newton_schulz.reference import V4_COEFFICIENTS
from kernels.triton_support.platform import ARCHITECTURES, is_interpreting, require_choice, require_device
from kernels.triton_support.tiles import Tile, Tiles, launch_best

DTYPES = (torch.bfloat16,)
"""Dtypes of products that run by default. The interpreter also computes float32."""
MIN_ROWS = 512
"""Rows from which the kernel runs by default: a smaller product does not occupy a GPU either way."""

TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16}),),
    "sm_80": (Tile(8, 3, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}),),
    "sm_90": (
        Tile(8, 3, {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}),
        Tile(8, 4, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}),
    ),
    "sm_100": (
        Tile(8, 3, {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}),
        Tile(8, 3, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}),
    ),
    "gfx942": (Tile(8, 1, {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 32}),),
}
assert set(TILES) == {"interpreter", *ARCHITECTURES}


def supports(matrices: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the backend runs by default for these matrices on a GPU."""
    return dtype in DTYPES and min(matrices.shape[-2:]) >= MIN_ROWS


def newton_schulz(
    matrices: Tensor,
    coefficients: Sequence[tuple[float, float, float]] = V4_COEFFICIENTS,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Implement :func:`kernels.newton_schulz.newton_schulz`. Raises ValueError for unsupported dtypes."""
    require_device("newton_schulz", matrices)
    require_choice("newton_schulz", "dtypes", dtype, (*DTYPES, torch.float32) if is_interpreting() else DTYPES)
    return iterate(matrices, coefficients, dtype, symmetric_product)


def blocks_of(rows: int, tile: Tile) -> int:
    """Return the blocks of a matrix that reach the diagonal or lie above it."""
    M, N = tile.sizes["BLOCK_M"], tile.sizes["BLOCK_N"]
    columns = -(-rows // N)
    return N // M * (columns * (columns - 1) // 2) + -(-rows // M)


def symmetric_product(
    left: Tensor, right: Tensor, added: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """Return ``alpha left right + beta added``, known to be symmetric, for matrices [r, c] and [c, r] or batches.

    With ``added``, ``right`` is symmetric, too: its rows then serve as its columns.
    """
    kernels = importlib.import_module("kernels.newton_schulz.triton_kernels")
    R, C = left.shape[-2:]
    left, rows = left.contiguous(), (right.mT if added is None else right).contiguous()
    batch = left.numel() // (R * C)
    has_added = added is not None
    added = added.contiguous() if added is not None else left

    def run(tile: Tile) -> Tensor:
        out = left.new_empty(*left.shape[:-1], R)
        kernels.symmetric[(blocks_of(R, tile), batch)](
            left, rows, added, out, R, C, alpha, beta,
            HAS_ADDED=has_added, PRECISION="ieee", UPCAST=is_interpreting(), **tile.options,
        )  # fmt: skip
        return out

    return launch_best("newton_schulz.symmetric", TILES, (batch, R, C, left.dtype), left.device, run)
