"""Compression of neighboring tokens into one entry by gated pooling (report eq. 9-12 with overlap, 20-23 without)."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.compress import cpu, reference, triton
from kernels.triton_support.platform import can_run

__all__ = ["BACKENDS", "backend_for", "compress", "compress_next"]

BACKENDS = {"reference": reference, "cpu": cpu, "triton": triton}


def backend_for(rows: Tensor, starts: Tensor | None = None) -> str:
    """Return the backend for rows. The ``cpu`` backend supports neither gradients nor packed documents."""
    if can_run(rows) and triton.supports(rows):
        return "triton"
    return "cpu" if starts is None and native.serves(rows) else "reference"


def compress(
    rows: Tensor,
    bias: Tensor,
    overlap: bool,
    has_previous: bool = False,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Pool blocks of ``m`` tokens into one entry each, by a softmax over tokens for every channel.

    Without overlap, w = c, and an entry pools the m rows of its block. With overlap, w = 2c and an entry pools 2m rows:
    channels [c:] of its own block and channels [:c] of the block before. The first block of a sequence has no
    predecessor.

    Args:
        rows: float32 [B, n * m, 2w]: values and gates, concatenated, of n complete blocks.
        bias: float32 [m, w], added to the gates by position in the block.
        overlap: Whether entries also pool the preceding block.
        has_previous: Whether the first block only serves as the predecessor of the second and has no entry.
        starts: bool [B, n], True for blocks that begin a packed document and so have no predecessor.

    Returns:
        float32 [B, n, c], or [B, n - 1, c] with ``has_previous``.
    """
    return get_backend(BACKENDS, backend or backend_for(rows, starts)).compress(
        rows, bias, overlap, has_previous, starts
    )


def compress_next(
    ring: Tensor, rows: Tensor, bias: Tensor, lengths: list[int], overlap: bool, backend: str | None = None
) -> Tensor:
    """Pool the blocks that new tokens complete, together with the rows of earlier tokens in a ring buffer.

    Args:
        ring: float32 [B, capacity, 2w]. The row of position p is at index ``p % capacity``. The capacity is at least
            m - 1, or 2m - 1 with overlap.
        rows: float32 [B, S, 2w], the rows of new tokens.
        bias: float32 [m, w], as for :func:`compress`.
        lengths: Number of tokens of each sequence before the new ones.
        overlap: Whether entries also pool the preceding block.

    Returns:
        float32 [B, n, c], where n is the highest number of blocks that a sequence completes. Sequences with fewer have
        theirs first, followed by zeros.
    """
    module = get_backend(BACKENDS, backend or backend_for(rows))
    return module.compress_next(ring, rows, bias, lengths, overlap)
