"""What one layer keeps of the past, and how it is read and written: rings of the newest tokens, and paged entries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.autocast import detached
from kernels.cache_io import EntryLayout, PagedRows, Pages, pack, write_ring
from kernels.paged_attention import TokenRows
from model.config import ModelConfig
from model.paging import PageTable, zeros
from model.precision import Precision


class Ring:
    """The newest rows of every sequence, [B, capacity, width], each at its position modulo the capacity."""

    def __init__(self, data: Tensor):
        self.data = data

    @property
    def capacity(self) -> int:
        return self.data.shape[1]

    @property
    def nbytes(self) -> int:
        return self.data.untyped_storage().nbytes()

    def read(self, ends: list[int], count: int) -> Tensor:
        """The ``count`` rows before positions ``ends``, one for each sequence: [B, count, width]. Rows of positions
        below 0 mean nothing."""
        if len(set(ends)) > 1:
            return self.data[self._places(ends, count)]
        pieces = [self.data[:, piece] for piece in self._pieces(ends[0], count)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def write(self, ends: list[int], rows: Tensor) -> None:
        """Put the last of rows [B, n, width], as many as fit, before positions ``ends``. They keep no graph alive."""
        if rows.shape[1] > self.capacity:
            rows = rows[:, -self.capacity :]
        write_ring(self.data, detached(rows), ends)

    def _pieces(self, end: int, count: int) -> list[slice]:
        """Where the ``count`` rows before ``end`` lie: in one piece, or in two around the ring's end."""
        first = (end - count) % self.capacity if self.capacity else 0
        if first + count <= self.capacity:
            return [slice(first, first + count)]
        return [slice(first, self.capacity), slice(0, first + count - self.capacity)]

    def _places(self, ends: list[int], count: int) -> tuple[Tensor, Tensor]:
        after = torch.tensor(ends, device=self.data.device).unsqueeze(-1)
        places = (after - count + torch.arange(count, device=self.data.device)) % self.capacity
        return torch.arange(len(ends), device=self.data.device).unsqueeze(-1), places


class Window:
    """The last raw tokens' key-values, packed."""

    component = "window"

    def __init__(self, table: PageTable, layout: EntryLayout, tokens: int, rewind: int):
        self.table, self.layout, self.tokens = table, layout, tokens
        shape = (len(table.lengths), tokens + rewind, layout.nbytes)
        self.ring = Ring(zeros(shape, torch.uint8, table.pool.device))

    def first_needed(self, position: int) -> int:
        """The oldest token that the one at ``position`` sees."""
        return position - (self.tokens - 1)

    def extend(self, new: Tensor) -> Tensor:
        """Append the new tokens' rows, uint8 [B, S, nbytes], and return them after the ``window - 1`` before: uint8
        [B, window - 1 + S, nbytes]. What lies before a sequence's start means nothing."""
        rows = torch.cat((self.ring.read(self.table.lengths, self.tokens - 1), new), dim=1)
        self.append(new)
        return rows

    def attended(self, new: Tensor) -> TokenRows:
        """Append the new tokens' rows, uint8 [B, S, nbytes], and return them with the ``window - 1`` before: in the
        ring itself where it has room for both."""
        first = self.table.starts
        if self.ring.capacity >= self.tokens - 1 + new.shape[1]:
            self.append(new)
            return TokenRows(self.ring.data, first.new_zeros(1), first)
        return TokenRows(self.extend(new), first - (self.tokens - 1), first)

    def append(self, new: Tensor) -> None:
        self.ring.write(self.table.ends, new)


@dataclass(frozen=True)
class Completion:
    """Sequences in which the new tokens complete the same number of blocks from the same place in a block."""

    sequences: list[int]
    past: int
    """How many kept rows come before the new tokens' own."""
    has_previous: bool
    """The first block of these rows is only the predecessor of the second."""
    first_entry: Tensor
    """int64 [sequences]: the number of the first entry to be made."""


class Tail:
    """Projected rows (values and gates) of the newest tokens, float32: blocks and overlaps are pooled from them."""

    component = "tail"

    def __init__(self, table: PageTable, ratio: int, width: int, overlap: bool, rewind: int):
        self.table, self.ratio, self.overlap = table, ratio, overlap
        rows = 2 * ratio - 1 if overlap else ratio - 1  # an unfinished block, and the whole one before it
        shape = (len(table.lengths), rows + rewind, 2 * (2 * width if overlap else width))
        self.ring = Ring(zeros(shape, torch.float32, table.pool.device))

    def first_needed(self, position: int) -> int:
        """The oldest token that the block of the one at ``position`` is pooled from."""
        return position // self.ratio * self.ratio - (self.ratio if self.overlap else 0)

    def completions(self, tokens: int) -> Iterator[Completion]:
        """Who completes blocks with ``tokens`` new tokens, sequences in the same phase together."""
        m = self.ratio
        groups: dict[tuple[int, bool], list[int]] = {}
        for sequence, start in enumerate(self.table.lengths):
            if (start + tokens) // m > start // m:
                groups.setdefault((start % m, self.overlap and start >= m), []).append(sequence)
        for (phase, has_previous), sequences in groups.items():
            starts = torch.tensor([self.table.lengths[s] for s in sequences], device=self.table.pool.device)
            yield Completion(sequences, phase + m * has_previous, has_previous, starts // m)

    def read(self, group: Completion) -> Tensor:
        """The kept rows of a group: float32 [sequences, past, width]."""
        rows = self.ring.read(self.table.lengths, group.past)
        return rows if len(group.sequences) == len(rows) else rows[group.sequences]

    def append(self, rows: Tensor) -> None:
        """The new tokens' rows, float32 [B, S, width]."""
        self.ring.write(self.table.ends, rows)


class Entries:
    """One growing part: packed rows in the pages of every sequence."""

    def __init__(self, table: PageTable, layer: int, name: str):
        self.table, self.layer, self.name = table, layer, name
        part = table.pool.parts[layer, name]
        self.layout, self.ratio = part.layout, part.ratio
        self.per_page = table.pool.page_tokens // part.ratio

    @property
    def _rows(self) -> Tensor:
        return self.table.pool.rows(self.layer, self.name)

    def append(self, x: Tensor) -> None:
        """The new entries, float [B, n, size]: of each sequence as many as its new tokens complete."""
        if not x.shape[1]:
            return
        packed = pack(x, self.layout)
        per_page = self.per_page
        places: list[int] = []
        made: list[int] = []
        for sequence, (pages, first, last) in enumerate(zip(self.table.pages, *self.table.entry_counts(self.ratio))):
            places += [pages[i // per_page] * per_page + i % per_page for i in range(first, last)]
            made += range(sequence * packed.shape[1], sequence * packed.shape[1] + last - first)
        rows = packed.flatten(0, 1)
        if len(made) < len(rows):
            rows = rows[torch.tensor(made, device=rows.device)]
        self._rows.index_copy_(0, torch.tensor(places, device=rows.device), rows)

    @property
    def counts(self) -> list[int]:
        """How many entries each sequence has, the new ones included."""
        return self.table.entry_counts(self.ratio)[1]

    @property
    def pages(self) -> Pages:
        """The rows of all sequences where they lie."""
        return Pages(self._rows, self.per_page, self.table.numbers)

    def rows(self) -> Tensor:
        """All rows, the new ones included: uint8 [B, T, nbytes], T those of the sequence with the most. Beyond a
        sequence's own they mean nothing."""
        most = max(self.counts)
        if len(self.counts) == 1:
            pages = PagedRows(self._rows, self.per_page, self.table.pages[0], self.table.in_a_row(0))
            return pages.slice(0, most).unsqueeze(0)
        last = torch.tensor(self.counts, device=self.table.pool.device).unsqueeze(-1) - 1
        return self.pages.gather(torch.arange(most, device=self.table.pool.device).minimum(last).clamp(min=0))

    def packed(self) -> Tensor:
        """The rows in use of a single sequence, as stored: uint8 [T, layout.nbytes]."""
        return self._rows[self._places()]

    def put_packed(self, rows: Tensor) -> None:
        """Inverse of :meth:`packed`, for as many rows as the sequence's length implies."""
        self._rows[self._places()] = rows

    def _places(self) -> Tensor:
        """Rows of the pool that hold a single sequence's entries."""
        (count,) = self.table.entry_counts(self.ratio)[0]
        entries = torch.arange(count, device=self.table.pool.device)
        return self.table.numbers[0][entries // self.per_page] * self.per_page + entries % self.per_page


class LayerCache:
    """One layer's share. Which parts exist depends on its mixer; a mixer only touches its own."""

    def __init__(self, config: ModelConfig, layer: int, table: PageTable, rewind: int):
        mixer = config.layers[layer]
        ratio, overlap = config.compress_ratio(mixer), mixer == "csa"
        if mixer != "gqa":
            self.window = Window(table, Precision(config).main_layout, config.window, rewind)
        if mixer in ("csa", "hca"):
            self.tail = Tail(table, ratio, config.head_dim, overlap, rewind)
        if mixer in ("csa", "hca", "gqa"):
            self.entries = Entries(table, layer, "entries")
        if mixer == "csa":
            self.index = Entries(table, layer, "index")
            self.index_tail = Tail(table, ratio, config.index_head_dim, True, rewind)

    def ring_parts(self) -> list[Window | Tail]:
        return [part for part in vars(self).values() if isinstance(part, Window | Tail)]
