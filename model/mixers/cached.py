"""Attention of new tokens over what a cache holds, in runs of a bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cache_io import unpack
from kernels.sparse_attention import INVARIANT_TILE, TiledAttention, packed_attention
from model.cache_parts import Entries
from model.execution import TILE
from model.mixers.base import Context
from model.precision import Precision

_VALUES = 1 << 22
"""Most values that a run of queries takes at once."""
_QUERIES = 64


class Selection(Protocol):
    """Which entries each of the new tokens attends to."""

    def run(self, queries: slice) -> tuple[Tensor, Tensor]:
        """Packed rows uint8 [B or 1, T, nbytes] or [B, s, K, nbytes] and their mask bool [B or 1, s, T or K] for some
        of the queries."""
        ...

    def tiles(self, sequences: Tensor, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The same for single tokens, int64 [N] each, in pieces of a fixed size: rows [N, E, nbytes], mask [N, E]."""
        ...

    def values(self, heads: int) -> int:
        """How many values each query of one sequence takes while it attends."""
        ...


@dataclass(frozen=True)
class Shared:
    """Every query attends to the first ``visible`` entries (int64 [B or 1, S]) of its sequence."""

    entries: Entries
    visible: Tensor

    def values(self, heads: int) -> int:
        return heads * _rounded_up(max(self.entries.counts))

    @cached_property
    def _rows(self) -> Tensor:
        return self.entries.rows()

    def run(self, queries: slice) -> tuple[Tensor, Tensor]:
        return self._rows, self.mask(queries)

    def mask(self, queries: slice) -> Tensor:
        """Which entries each of the queries sees: bool [B or 1, s, T]."""
        numbers = torch.arange(max(self.entries.counts), device=self.visible.device)
        return numbers < self.visible[:, queries].unsqueeze(-1)

    def tiles(self, sequences: Tensor, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        counts = self.entries.counts
        visible = self.visible.expand(len(counts), -1)[sequences, queries]
        last = torch.tensor(counts, device=visible.device).unsqueeze(-1) - 1
        for begin in range(0, max(counts), INVARIANT_TILE):
            numbers = torch.arange(begin, begin + INVARIANT_TILE, device=visible.device)
            rows = self.entries.gather(numbers.minimum(last).clamp(min=0))
            yield rows[sequences], numbers < visible.unsqueeze(-1)


@dataclass(frozen=True)
class Chosen:
    """Every query attends to the entries ``numbers``, int64 [B, S, k], where they are not -1."""

    entries: Entries
    numbers: Tensor

    def values(self, heads: int) -> int:
        return self.numbers.shape[-1] * self.entries.layout.size

    def run(self, queries: slice) -> tuple[Tensor, Tensor]:
        numbers = self.numbers[:, queries]
        return self.entries.gather(numbers.clamp(min=0)), numbers >= 0

    def tiles(self, sequences: Tensor, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        numbers = self.numbers[sequences, queries]
        yield self.entries.gather_of(sequences, numbers.clamp(min=0)), numbers >= 0


def cached_attention(
    query: Tensor,
    window_rows: Tensor,
    selection: Selection | None,
    sink: Tensor,
    precision: Precision,
    context: Context,
) -> Tensor:
    """query [B, S, H, c]; window_rows uint8 [B, window - 1 + S, nbytes]: the tokens before the new ones, and these.
    Returns float32 [B, S, H, c]."""
    if context.execution.batch_invariant:
        return _token_by_token(query, window_rows, selection, sink, precision, context)
    B, S = query.shape[:2]
    before = window_rows.shape[1] - S
    step = queries_at_once(selection, query) if S > 1 else 1
    attention = context.execution.function(packed_attention)
    fixed = context.execution.fixed_shapes
    runs = []
    for begin in range(0, S, step):
        queries = slice(begin, min(begin + step, S))
        rows, mask = selection.run(queries) if selection is not None else (None, None)
        nearby = window_rows[:, begin : before + queries.stop]
        run = [query[:, queries], nearby, context.positions[:, begin].expand(B), rows, mask]
        if fixed:
            run = _filled_up(run, step)
        out = attention(*run, sink, precision.main_layout, before + 1)
        runs.append(out[:B, : queries.stop - begin])
    return torch.cat(runs, dim=1)


def queries_at_once(selection: Selection | None, query: Tensor) -> int:
    """A power of two: how many of the queries [B, S, H, c] are worked on together, so that memory stays bounded."""
    each = 1 if selection is None else max(1, len(query) * selection.values(query.shape[2]))
    return min(_QUERIES, 1 << max(1, _VALUES // each).bit_length() - 1)


def _rounded_up(entries: int) -> int:
    return max(64, 1 << (entries - 1).bit_length())


def _filled_up(run: list[Tensor | None], queries: int) -> list[Tensor | None]:
    """The same run with as many queries, and a power of two of sequences and shared entries."""
    query, window_rows, first, rows, mask = run
    assert query is not None and window_rows is not None and first is not None
    B, S = query.shape[:2]
    more, later = (1 << (B - 1).bit_length()) - B, queries - S
    entries = 0 if mask is None else _rounded_up(mask.shape[-1]) - mask.shape[-1]
    if not (more or later or entries):
        return run
    if rows is not None and mask is not None:
        mask = F.pad(mask.expand(B, -1, -1), (0, entries, 0, later, 0, more))
        rows = F.pad(rows, (0, 0, 0, entries, 0, later, 0, more) if rows.dim() == 4 else (0, 0, 0, entries, 0, more))
    query = F.pad(query, (0, 0, 0, 0, 0, later, 0, more))
    return [query, F.pad(window_rows, (0, 0, 0, later, 0, more)), F.pad(first, (0, more)), rows, mask]


def _token_by_token(
    query: Tensor,
    window_rows: Tensor,
    selection: Selection | None,
    sink: Tensor,
    precision: Precision,
    context: Context,
) -> Tensor:
    window = window_rows.shape[1] - query.shape[1] + 1
    windows = window_rows.unfold(1, window, 1).transpose(2, 3)  # [B, S, window, nbytes]
    positions = context.positions.expand(len(query), -1)
    age = torch.arange(window - 1, -1, -1, device=query.device)

    def attend(query: Tensor, sequences: Tensor, queries: Tensor) -> Tensor:
        attention = TiledAttention(query, sink)
        exists = age <= positions[sequences, queries].unsqueeze(-1)
        attention.add(unpack(windows[sequences, queries], precision.main_layout), exists)
        if selection is not None:
            for rows, mask in selection.tiles(sequences, queries):
                attention.add(unpack(rows, precision.main_layout), mask)
        return attention.output()

    return by_tokens(attend, query)


def by_tokens(attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor) -> Tensor:
    """Attention for :data:`TILE` tokens of any sequences at a time: ``attend`` gets their queries [TILE, H, c] and
    numbers (of sequences, and of tokens in them: int64 [TILE] each) and gives their outputs."""
    B, S = query.shape[:2]
    outputs = []
    for begin in range(0, B * S, TILE):
        tokens = torch.arange(begin, begin + TILE, device=query.device).clamp(max=B * S - 1)
        sequences, queries = tokens // S, tokens % S
        outputs.append(attend(query[sequences, queries], sequences, queries))
    return torch.cat(outputs)[: B * S].view_as(query)
