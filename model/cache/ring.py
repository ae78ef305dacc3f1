"""Ring buffers of the newest tokens' rows: the sliding window and the compressors' state."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.autocast import detached
from kernels.cache_io import write_ring
from kernels.paged_attention import TokenRows
from model.cache.pages import PageTable, zeros
from model.cache.parts import CompressorPart, WindowPart


class Ring:
    """The newest rows of every sequence, [B, capacity, width]: the row of position p is at p modulo the capacity."""

    def __init__(self, table: PageTable, rows: int, width: int, dtype: torch.dtype):
        self.table = table
        self.data = zeros((len(table.lengths), rows, width), dtype, table.pool.device)

    @property
    def capacity(self) -> int:
        return self.data.shape[1]

    def first_needed(self, position: int) -> int:
        """Return the position of the oldest row that a token at ``position`` needs."""
        raise TypeError(f"{type(self).__name__} defines no first_needed")

    def can_resume_at(self, sequence: int, length: int, high_water_mark: int) -> bool:
        """Return whether tokens from position ``length`` on find all rows they need, after rows up to the
        ``high_water_mark`` were written."""
        return max(0, self.first_needed(length)) >= high_water_mark - self.capacity

    def truncate(self, sequence: int, length: int) -> None:
        """Truncate to ``length`` tokens. Zeroes an empty sequence, because masked rows must be finite."""
        if not length:
            self.data[sequence].zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Return the storage by name, [B, ...] each."""
        return {"": self.data}

    def read(self, count: int, sequences: list[int] | None = None) -> Tensor:
        """Return the ``count`` rows before the new tokens of all sequences or of some, [B, count, width]. Rows before a
        sequence's start are arbitrary."""
        lengths = self.table.lengths
        if sequences is not None and len(sequences) < len(lengths):
            return self._gather(sequences, [lengths[sequence] for sequence in sequences], count)
        if len(set(lengths)) > 1:
            return self._gather(range(len(lengths)), lengths, count)
        pieces = [self.data[:, piece] for piece in self._slices(lengths[0], count)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def append(self, rows: Tensor) -> None:
        """Write the new tokens' rows [B, S, width], or as many of the last as fit. Detaches them."""
        first = self.table.starts
        if (surplus := rows.shape[1] - self.capacity) > 0:
            rows, first = rows[:, surplus:], first + surplus
        write_ring(self.data, detached(rows), first)

    def saved(self) -> dict[str, Tensor]:
        """Return the written rows of a single sequence, oldest first, by name."""
        return {"": self.read(min(self.table.lengths[0], self.capacity))[0]}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors of :meth:`saved` for a sequence of the same length."""
        rows = tensors[""].unsqueeze(0)
        write_ring(self.data, rows, self.table.starts - rows.shape[1])

    def _slices(self, end: int, count: int) -> list[slice]:
        """Return one slice of the ``count`` rows before ``end``, or two if they wrap around."""
        first = (end - count) % self.capacity
        if first + count <= self.capacity:
            return [slice(first, first + count)]
        return [slice(first, self.capacity), slice(0, first + count - self.capacity)]

    def _gather(self, sequences: Iterable[int], ends: list[int], count: int) -> Tensor:
        """Return the ``count`` rows before ``ends`` of ``sequences``: [len(ends), count, width]."""
        device, width = self.data.device, self.data.shape[2]
        first = torch.tensor([end - count for end in ends], device=device).unsqueeze(-1)
        offsets = torch.tensor([sequence * self.capacity for sequence in sequences], device=device).unsqueeze(-1)
        rows = (first + torch.arange(count, device=device)) % self.capacity + offsets
        # index_select is ten times as fast on a CPU as indexing, which copies element by element.
        return self.data.view(-1, width).index_select(0, rows.flatten()).view(len(ends), count, width)


class WindowCache(Ring):
    """Packed key-values of the sliding window, uint8."""

    def __init__(self, table: PageTable, part: WindowPart, rewind: int):
        super().__init__(table, part.tokens + rewind, part.layout.nbytes, torch.uint8)
        self.part = part

    def first_needed(self, position: int) -> int:
        return position - (self.part.tokens - 1)

    def extend(self, new: Tensor) -> Tensor:
        """Append the new tokens' rows, uint8 [B, S, nbytes], and return them after the previous ``window - 1`` rows:
        uint8 [B, window - 1 + S, nbytes]. Rows before a sequence's start are arbitrary."""
        rows = torch.cat((self.read(self.part.tokens - 1), new), dim=1)
        self.append(new)
        return rows

    def attended(self, new: Tensor) -> TokenRows:
        """Append the new tokens' rows, uint8 [B, S, nbytes], and return them with the previous ``window - 1`` rows,
        in place if the ring has room for both."""
        first = self.table.starts
        if self.capacity >= self.part.tokens - 1 + new.shape[1]:
            self.append(new)
            return TokenRows(self.data, first.new_zeros(1), first)
        return TokenRows(self.extend(new), first - (self.part.tokens - 1), first)


class CompressorState(Ring):
    """Projected values and gates of the tokens in an unfinished block, and of the block before it where blocks overlap;
    float32.

    With ratio 4 and overlap, after 10 tokens::

        positions   0 1 2 3 | 4 5 6 7 | 8 9
        entries     0         1         (2 is pooled from 4..7 and 8..11 once token 11 arrives)
        kept                  4 5 6 7   8 9
    """

    def __init__(self, table: PageTable, part: CompressorPart, rewind: int):
        super().__init__(table, part.rows + rewind, part.row_width, torch.float32)
        self.part = part

    def first_needed(self, position: int) -> int:
        ratio = self.part.ratio
        return position // ratio * ratio - (ratio if self.part.overlap else 0)
