"""Compression of neighboring tokens into one entry (report eq. 9-12 with overlap, 20-23 without).

Gated pooling, RMS norm, rotation by position and rounding to the entry's storage format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.cache_io import EntryLayout, Pages
from kernels.compress import cpu, eager, reference, triton
from kernels.compress.inputs import DocumentBlocks, Finish
from kernels.triton_support.platform import can_run

__all__ = ["BACKENDS", "DocumentBlocks", "Finish", "backend_for", "compress", "compress_next"]

BACKENDS = {"reference": reference, "eager": eager, "cpu": cpu, "triton": triton}


def backend_for(rows: Tensor, finish: Finish, blocks: DocumentBlocks | None = None) -> str:
    """Return the backend for rows. The ``cpu`` backend supports neither gradients nor packed documents."""
    if can_run(rows) and triton.supports(rows, finish):
        return "triton"
    return "cpu" if blocks is None and native.serves(rows) else "eager"


def compress(
    rows: Tensor,
    bias: Tensor,
    finish: Finish,
    overlap: bool,
    has_previous: bool = False,
    blocks: DocumentBlocks | None = None,
    layout: EntryLayout | None = None,
    backend: str | None = None,
) -> Tensor:
    """Pool blocks of ``m`` tokens into one entry each, by a softmax over tokens for every channel.

    Without overlap, w = c, and an entry pools the m rows of its block. With overlap, w = 2c and an entry pools 2m rows:
    channels [c:] of its own block and channels [:c] of the block before. The first block of a sequence has no
    predecessor.

    Args:
        rows: float32 [B, n * m, 2w]: values and gates, concatenated, of n complete blocks. With ``blocks``, of any
            number of tokens.
        bias: float32 [m, w], added to the gates by position in the block.
        finish: Norm and rotation of the pooled entries.
        overlap: Whether entries also pool the preceding block.
        has_previous: With ``overlap``, whether the first block only serves as the predecessor of the second and has no
            entry. Cannot be combined with ``blocks``.
        blocks: The blocks of packed documents. The entries of padding are zeros.
        layout: Format that entries are rounded to, with a straight-through gradient. None leaves them in float32.

    Returns:
        float32 [B, n, c], or [B, n - 1, c] with ``overlap`` and ``has_previous``.
    """
    if has_previous and blocks is not None:
        raise ValueError("compress: has_previous and blocks are mutually exclusive")
    return get_backend(BACKENDS, backend or backend_for(rows, finish, blocks)).compress(
        rows, bias, finish, overlap, has_previous, blocks, layout
    )


def compress_next(
    ring: Tensor,
    rows: Tensor,
    bias: Tensor,
    finish: Finish,
    lengths: Tensor,
    overlap: bool,
    layout: EntryLayout,
    pages: Pages,
    backend: str | None = None,
) -> None:
    """Pool the blocks that new tokens complete, together with the rows of earlier tokens in a ring buffer, and write
    the entries to the cache's pages, packed. No gradient.

    Args:
        ring: float32 [B, capacity, 2w], contiguous. The row of position p is at index ``p % capacity``. The capacity is
            at least m - 1, or 2m - 1 with overlap.
        rows: float32 [B, S, 2w], the rows of new tokens.
        bias: float32 [m, w], as for :func:`compress`.
        finish: Norm and rotation of n entries per sequence, where n is the largest number of blocks that S tokens can
            complete, S / m rounded up. A sequence that completes fewer uses the first ones.
        lengths: int64 [B or 1], number of tokens of each sequence before the new ones.
        overlap: Whether entries also pool the preceding block.
        layout: Layout of the rows of the pages.
        pages: Cache pages, updated in place. Entry i of a sequence is its row i. Pages of new tokens must not be
            shared.
    """
    module = get_backend(BACKENDS, backend or backend_for(rows, finish))
    _check_ring(ring, rows, bias, lengths, overlap)
    module.compress_next(ring, rows, bias, finish, lengths, overlap, layout, pages)


def _check_ring(ring: Tensor, rows: Tensor, bias: Tensor, lengths: Tensor, overlap: bool) -> None:
    """Raise ValueError unless the ring buffer has the layout that :func:`compress_next` requires."""
    (m, w), B = bias.shape, len(rows)
    capacity = 2 * m - 1 if overlap else m - 1
    if lengths.dtype != torch.int64 or lengths.shape not in ((B,), (1,)):
        found = f"{str(lengths.dtype).removeprefix('torch.')} {list(lengths.shape)}"
        raise ValueError(f"compress_next: lengths must be int64 [{B} or 1], found {found}")
    if ring.dtype != torch.float32 or not ring.is_contiguous():
        found = f"{str(ring.dtype).removeprefix('torch.')} with strides {list(ring.stride())}"
        raise ValueError(f"compress_next: ring must be contiguous float32, found {found}")
    if ring.dim() != 3 or (ring.shape[0], ring.shape[2]) != (B, 2 * w) or ring.shape[1] < capacity:
        expected = f"[{B}, at least {capacity}, {2 * w}]"
        raise ValueError(f"compress_next: ring must have the shape {expected}, found {list(ring.shape)}")
    if rows.dim() != 3 or (rows.shape[0], rows.shape[2]) != (B, 2 * w):
        raise ValueError(f"compress_next: rows must have the shape [{B}, tokens, {2 * w}], found {list(rows.shape)}")
