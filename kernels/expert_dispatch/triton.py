"""Experts by Triton kernels, forward and backward: products of all experts' rows in one launch, without padding.

A tile of rows belongs to one expert. A launch has as many tiles as the rows fill, and one more per expert, which is
enough for every distribution. The list of tiles is made on the GPU from the counts, which does not synchronize.
Products have BF16 or FP16 operands and float32 sums, in a fixed order.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from kernels.expert_dispatch.eager import combine, dispatch
from kernels.expert_dispatch.permutation import Dispatch
from kernels.swiglu import swiglu
from kernels.triton_support.platform import (
    ARCHITECTURES,
    is_interpreting,
    require_choice,
    require_device,
    require_shapes,
)
from kernels.triton_support.tiles import Tile, Tiles, launch_best

__all__ = ["combine", "dispatch", "run_experts"]

DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes of products. The interpreter also computes float32."""

TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}),),
    "sm_80": (Tile(8, 3, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}),),
    "sm_90": (
        Tile(8, 3, {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}),
        Tile(8, 3, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}),
    ),
    "sm_100": (Tile(8, 3, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}),),
    "gfx942": (Tile(4, 1, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}),),
}
assert set(TILES) == {"interpreter", *ARCHITECTURES}


def supports(rows: Tensor) -> bool:
    """Return whether the backend supports these rows on a GPU."""
    return rows.dtype in DTYPES


def run_experts(rows: Tensor, gains: Tensor, stacks: tuple[Tensor, ...], plan: Dispatch, limit: float) -> Tensor:
    """Implement :func:`kernels.expert_dispatch.run_experts`. Raises ValueError for unsupported dtypes."""
    require_device("expert_dispatch", rows)
    require_choice("expert_dispatch", "dtypes", rows.dtype, (*DTYPES, torch.float32) if is_interpreting() else DTYPES)
    (R, d), (E, inner) = rows.shape, stacks[0].shape[:2]
    w1, w3, w2 = stacks
    require_shapes(
        "expert_dispatch",
        w1=(w1, (E, inner, d)),
        w3=(w3, (E, inner, d)),
        w2=(w2, (E, d, inner)),
        gains=(gains, (R, 1)),
        counts=(plan.counts, (E,)),
    )
    w1, w3, w2 = (w.to(rows.dtype) for w in stacks)
    gate, up = (_Multiply.apply(rows, w, plan.counts) for w in (w1, w3))
    return _Multiply.apply(swiglu(gate, up, limit, gains), w2, plan.counts)


def tile_list(counts: Tensor, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the experts of all tiles of up to ``size`` rows, -1 for superfluous tiles, and the tiles' first rows.

    ``counts`` [experts] sum to ``rows``. Both results are int64 [rows // size + experts].
    """
    tiles = (counts + size - 1) // size
    ends = tiles.cumsum(0)
    numbers = torch.arange(rows // size + len(counts), device=counts.device)
    experts = torch.searchsorted(ends, numbers, right=True)
    own = experts.clamp(max=len(counts) - 1)
    first_rows = (counts.cumsum(0) - counts)[own] + (numbers - (ends - tiles)[own]) * size
    return torch.where(experts < len(counts), experts, -1), first_rows


class _Multiply(torch.autograd.Function):
    """Products of rows [rows, in] with their experts' matrices [experts, out, in]: [rows, out]."""

    @staticmethod
    def forward(ctx, rows, stack, counts):
        rows, stack = rows.contiguous(), stack.contiguous()
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        ctx.save_for_backward(rows, stack, counts, offsets)
        return _multiply(rows, stack, counts, offsets, transposed=False)

    @staticmethod
    def backward(ctx, grad):
        rows, stack, counts, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = _multiply(grad, stack, counts, offsets, transposed=True) if ctx.needs_input_grad[0] else None
        grad_stack = _multiply_rows(grad, rows, offsets) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_stack, None


def _multiply(rows: Tensor, stack: Tensor, counts: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """Return the products of rows with matrices [out, in], or with ``transposed``, [in, out]."""
    kernels = importlib.import_module("kernels.expert_dispatch.triton_kernels")
    (R, K), E = rows.shape, len(stack)
    N = stack.shape[2 if transposed else 1]

    def run(tile: Tile) -> Tensor:
        out = rows.new_empty(R, N)
        experts, first_rows = tile_list(counts, R, tile.sizes["BLOCK_M"])
        kernels.multiply[(len(experts) * -(-N // tile.sizes["BLOCK_N"]),)](
            rows, stack, offsets, experts, first_rows, out, N, K,
            TRANSPOSED=transposed, UPCAST=is_interpreting(), **tile.options,
        )  # fmt: skip
        return out

    return launch_best("expert_dispatch.multiply", TILES, (R, N, K, E, transposed, rows.dtype), rows.device, run)


def _multiply_rows(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Return ``left^T right`` over the rows of every expert, [experts, M, N]."""
    kernels = importlib.import_module("kernels.expert_dispatch.triton_kernels")
    (R, M), N, E = left.shape, right.shape[1], len(offsets) - 1

    def run(tile: Tile) -> Tensor:
        out = left.new_empty(E, M, N)
        kernels.multiply_rows[(-(-M // tile.sizes["BLOCK_M"]), -(-N // tile.sizes["BLOCK_N"]), E)](
            left, right, offsets, out, M, N, UPCAST=is_interpreting(), **tile.options
        )
        return out

    return launch_best("expert_dispatch.multiply_rows", TILES, (R, M, N, E, left.dtype), left.device, run)
