"""Argument types of :func:`kernels.compress.compress`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Finish(NamedTuple):
    """Parameters of the steps after pooling: RMS norm, rotary embedding, and a Hadamard rotation of index keys."""

    norm_weight: Tensor
    """float32 [c]"""
    norm_eps: float
    """Added to the mean square."""
    cos: Tensor
    """float32 [B or 1, n, r] for n entries, as in :func:`kernels.rotary.rotate`."""
    sin: Tensor
    """float32 [B or 1, n, r]"""
    hadamard: bool = False
    """True to multiply entries by the Hadamard matrix. Requires c to be a power of two."""


class DocumentBlocks(NamedTuple):
    """Complete blocks of the documents packed into each row, padded to the same number per row."""

    first: Tensor
    """int64 [B, n]: index of the block's first token in the row, or -1 for padding."""
    starts: Tensor
    """bool [B, n]: whether the block begins a document and so has no predecessor."""
