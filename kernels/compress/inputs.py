"""Inputs of the pooling beside the projections."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Finish(NamedTuple):
    """Steps that turn a pooled block into an entry: RMS norm, rotation, and for index keys the Hadamard rotation."""

    norm_weight: Tensor
    """float32 [c]"""
    norm_eps: float
    """Added to the mean square."""
    cos: Tensor
    """float32 [B or 1, n, r] for n entries, as in :func:`kernels.rotary.rotate`."""
    sin: Tensor
    """float32 [B or 1, n, r]"""
    hadamard: bool = False
    """Whether entries, c a power of two, are rotated by the Hadamard matrix."""


class DocumentBlocks(NamedTuple):
    """Complete blocks of packed documents, row by row. Shorter rows are padded."""

    first: Tensor
    """int64 [B, n]: index of the block's first token in the row, or -1 for padding."""
    starts: Tensor
    """bool [B, n]: whether the block begins a document and so has no predecessor."""
