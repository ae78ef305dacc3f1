"""What one layer keeps of the past, and how it is read and written: rings of the newest tokens, and paged entries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cache_io import EntryLayout, PagedRows, pack
from model.config import ModelConfig
from model.paging import PageTable, zeros
from model.precision import Precision


def ring_ages(capacity: int, position: Tensor) -> Tensor:
    """How many tokens lie between each row of a :class:`Ring` of one sequence and the one at ``position``, int64 [1],
    whose own row does not count, written already or not: int64 [capacity], 0 for the newest. Ages that lie before the
    sequence's start are the caller's to mask."""
    return (position - 1 - torch.arange(capacity, device=position.device)) % capacity


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
        return torch.cat([self.data[:, piece] for piece in self._pieces(ends[0], count)], dim=1)

    def write(self, ends: list[int], rows: Tensor) -> None:
        """Put rows [B, n, width], n at most the capacity, before positions ``ends``. They keep no graph alive."""
        rows, count = rows.detach(), rows.shape[1]
        if len(set(ends)) > 1:
            self.data[self._places(ends, count)] = rows
            return
        done = 0
        for piece in self._pieces(ends[0], count):
            self.data[:, piece] = rows[:, done : done + piece.stop - piece.start]
            done += piece.stop - piece.start

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

    def append(self, new: Tensor) -> None:
        self.ring.write(self.table.ends, new[:, -self.ring.capacity :])


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
        self.ring.write(self.table.ends, rows[:, -self.ring.capacity :])


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
        if x.shape[1]:
            self.append_packed(pack(x, self.layout))

    def append_packed(self, packed: Tensor) -> None:
        """The same as rows, uint8 [B, n, nbytes]."""
        before, after = self.table.entry_counts(self.ratio)
        new = [last - first for first, last in zip(before, after)]
        if not any(new):
            return
        device, numbers = packed.device, torch.arange(packed.shape[1], device=packed.device)
        made = numbers < torch.tensor(new, device=device).unsqueeze(-1)
        last = torch.tensor(after, device=device).unsqueeze(-1) - 1
        numbers = torch.tensor(before, device=device).unsqueeze(-1) + numbers
        self._rows[self._places(numbers.minimum(last.clamp(min=0)))[made]] = packed[made]

    @property
    def counts(self) -> list[int]:
        """How many entries each sequence has, the new ones included."""
        return self.table.entry_counts(self.ratio)[1]

    def paged(self, sequence: int) -> PagedRows:
        """One sequence's rows where they lie."""
        return PagedRows(self._rows, self.per_page, self.table.pages[sequence], self.table.in_a_row(sequence))

    def rows(self) -> Tensor:
        """All rows, the new ones included: uint8 [B, T, nbytes], T those of the sequence with the most. Beyond a
        sequence's own they mean nothing."""
        most = max(self.counts)
        if len(self.counts) == 1:
            return self.paged(0).slice(0, most).unsqueeze(0)
        last = torch.tensor(self.counts, device=self.table.pool.device).unsqueeze(-1) - 1
        return self.gather(torch.arange(most, device=self.table.pool.device).minimum(last).clamp(min=0))

    def at_least(self, count: int) -> Tensor:
        """The first ``count`` rows of a single sequence, uint8 [count, nbytes]. Beyond its own they mean
        nothing, but are finite."""
        return self.paged(0).at_least(0, count)

    def gather(self, numbers: Tensor) -> Tensor:
        """Rows by number, int64 [B, ...] -> uint8 [B, ..., nbytes]. Only these rows are touched."""
        return self._take(self._places(numbers))

    def gather_of(self, sequences: Tensor, numbers: Tensor) -> Tensor:
        """Rows of single sequences, int64 [N], by number, int64 [N, k] -> uint8 [N, k, nbytes]."""
        pages = self.table.numbers[sequences.unsqueeze(-1), numbers // self.per_page]
        return self._take(pages * self.per_page + numbers % self.per_page)

    def packed(self) -> Tensor:
        """The rows in use of a single sequence, as stored: uint8 [T, layout.nbytes]."""
        return self._take(self._all_places())

    def put_packed(self, rows: Tensor) -> None:
        """Inverse of :meth:`packed`, for as many rows as the sequence's length implies."""
        self._rows[self._all_places()] = rows

    def _take(self, places: Tensor) -> Tensor:
        # Ten times as fast on a CPU as indexing, which copies byte by byte.
        return self._rows.index_select(0, places.flatten()).view(*places.shape, self.layout.nbytes)

    def _all_places(self) -> Tensor:
        (count,) = self.table.entry_counts(self.ratio)[0]
        numbers = torch.arange(count, device=self.table.pool.device).unsqueeze(0)
        return self._places(numbers)[0] if count else numbers[0]

    def _places(self, numbers: Tensor) -> Tensor:
        """Rows of the pool that hold the entries ``numbers`` [B, ...]."""
        pages = self.table.numbers.gather(1, (numbers // self.per_page).flatten(1)).view_as(numbers)
        return pages * self.per_page + numbers % self.per_page


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

    def append(self, kept: dict[str, Tensor]) -> None:
        """One token's rows, by part: [1, 1, ...]. Of entries, those that the token completes are kept."""
        for name, row in kept.items():
            part = getattr(self, name)
            part.append_packed(row) if isinstance(part, Entries) else part.append(row)

    def ring_parts(self) -> list[Window | Tail]:
        return [part for part in vars(self).values() if isinstance(part, Window | Tail)]
