"""Keys of :func:`kernels.paged_attention.paged_attention`: packed rows of tokens and of compressed entries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.cache_io import Pages


@dataclass(frozen=True)
class TokenRows:
    """Packed rows of the newest tokens. The row of position p is row ``(p - offset) % R``."""

    rows: Tensor
    """uint8 [B, R, nbytes], including the tokens of the queries and the window before them."""
    offsets: Tensor
    """int64 [B or 1]"""
    first: Tensor
    """int64 [B or 1]: position of the first query."""


@dataclass(frozen=True)
class EntrySet:
    """Packed entries that queries attend to. Exactly one of ``chosen`` and ``visible`` is given."""

    pages: Pages
    chosen: Tensor | None = None
    """int64 [B, S, K]: indices of entries for every query; -1 in unused slots."""
    visible: Tensor | None = None
    """int64 [B or 1, S], not decreasing in S: every query attends to this many entries, the first ones."""
