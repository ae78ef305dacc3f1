"""Cache parts that a mixer can declare, with their sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.cache_io import EntryLayout


@dataclass(frozen=True)
class GrowingPart:
    """One packed row of ``layout.nbytes`` bytes per ``ratio`` tokens, in pages. ``component`` groups parts in
    reports."""

    layout: EntryLayout
    ratio: int
    component: str


@dataclass(frozen=True)
class WindowPart:
    """Packed rows of the newest ``tokens`` tokens."""

    layout: EntryLayout
    tokens: int
    component: ClassVar[str] = "window"

    def nbytes(self, rewind: int = 0) -> int:
        """Bytes per sequence. ``rewind`` more tokens are kept for :meth:`model.cache.Cache.truncate`."""
        return (self.tokens + rewind) * self.layout.nbytes


@dataclass(frozen=True)
class CompressorPart:
    """Projected values and gates of the newest tokens, float32. Blocks of ``ratio`` tokens are pooled to entries of
    ``width`` dims. With ``overlap`` an entry also pools the previous block, with separate projections."""

    ratio: int
    width: int
    overlap: bool
    component: ClassVar[str] = "tail"

    @property
    def rows(self) -> int:
        """Number of tokens kept: an unfinished block and, with ``overlap``, the block before it."""
        return 2 * self.ratio - 1 if self.overlap else self.ratio - 1

    @property
    def row_width(self) -> int:
        return 4 * self.width if self.overlap else 2 * self.width

    def nbytes(self, rewind: int = 0) -> int:
        return (self.rows + rewind) * self.row_width * torch.float32.itemsize


@dataclass(frozen=True)
class RecurrentPart:
    """A recurrent state of fixed size after the last token, [*shape] per sequence."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    component: ClassVar[str] = "state"

    def nbytes(self, rewind: int = 0) -> int:
        """Bytes per sequence: ``rewind`` + 1 states with their positions."""
        return (rewind + 1) * (math.prod(self.shape) * self.dtype.itemsize + torch.int64.itemsize)


FixedPart = WindowPart | CompressorPart | RecurrentPart
CachePart = GrowingPart | FixedPart
