"""Gated pooling by Triton kernels, forward and backward, with one pass over the rows each."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from kernels.compress.reference import pool_next
from kernels.triton_support.platform import ARCHITECTURES, require_choice, require_device
from kernels.triton_support.tiles import Tile, Tiles, launch_best

TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"elements": 64}),),
    **{name: (Tile(4, 1, {"elements": 4096}), Tile(4, 1, {"elements": 2048})) for name in ARCHITECTURES},
}


def block_constants(m: int, c: int, elements: int) -> dict[str, int]:
    """Return the block sizes of a program that pools about ``elements`` values: rows of a block times channels."""
    rows = max(2, 1 << (m - 1).bit_length())
    return {"M_PAD": rows, "BLOCK_C": max(16, min(elements // rows, 1 << (c - 1).bit_length()))}


def supports(rows: Tensor) -> bool:
    """Return whether the backend supports these rows on a GPU."""
    return rows.dtype == torch.float32


def compress(
    rows: Tensor, bias: Tensor, overlap: bool, has_previous: bool = False, starts: Tensor | None = None
) -> Tensor:
    """Implement :func:`kernels.compress.compress`. Raises ValueError for dtypes other than float32."""
    require_device("compress", rows)
    require_choice("compress", "dtypes", rows.dtype, (torch.float32,))
    return _Compress.apply(rows, bias, overlap, has_previous and overlap, starts)


def compress_next(ring: Tensor, rows: Tensor, bias: Tensor, lengths: list[int], overlap: bool) -> Tensor:
    """Implement :func:`kernels.compress.compress_next`. Raises ValueError for dtypes other than float32."""
    return pool_next(compress, ring, rows, bias, lengths, overlap)


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, bias, overlap, has_previous, starts):
        B, S, _ = rows.shape
        m, w = bias.shape
        n, c = S // m, w // 2 if overlap else w
        rows, bias = rows.contiguous(), bias.float().contiguous()
        starts = None if starts is None or not overlap else starts.contiguous().view(torch.int8)
        out = rows.new_empty(B, n - has_previous, c)
        ctx.shape, ctx.overlap, ctx.skipped = (B, n, m, w, c), overlap, int(has_previous)
        if out.numel():
            out = _launch("forward", ctx, lambda: torch.empty_like(out), rows, bias, starts)
        ctx.save_for_backward(rows, bias, out, starts)
        return out

    @staticmethod
    def backward(ctx, grad):
        rows, bias, out, starts = ctx.saved_tensors
        grad_rows = torch.zeros_like(rows)
        if out.numel():
            # Channels that no entry pools keep their zeros.
            allocate = lambda: torch.zeros_like(rows)  # noqa: E731
            grad_rows = _launch("backward", ctx, allocate, rows, bias, starts, out, grad.contiguous())
        m, w = bias.shape
        grad_bias = grad_rows.view(-1, m, 2 * w)[..., w:].sum(0)
        return grad_rows, grad_bias, None, None, None


def _launch(name: str, ctx, allocate, rows: Tensor, bias: Tensor, starts: Tensor | None, *more: Tensor) -> Tensor:
    """Launch the kernel ``name`` with ``more`` arguments and an allocated output, which is returned."""
    kernel = getattr(importlib.import_module("kernels.compress.triton_kernels"), name)
    B, n, m, w, c = ctx.shape

    def run(tile: Tile) -> Tensor:
        out = allocate()
        blocks = block_constants(m, c, tile.sizes["elements"])
        grid = (n - ctx.skipped, -(-c // blocks["BLOCK_C"]), B)
        kernel[grid](
            rows, bias, bias if starts is None else starts, *more, out, n, m, w, c, ctx.skipped,
            OFFSET_IS_C=ctx.overlap, HAS_STARTS=starts is not None, **blocks, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
        return out

    return launch_best(f"compress.{name}", TILES, (*ctx.shape, ctx.overlap), rows.device, run)
