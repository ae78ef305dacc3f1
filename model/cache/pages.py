"""Paged storage of the growing parts of caches (report 3.5.1).

A page covers ``config.page_tokens`` tokens of one sequence in all layers, with the packed rows of every growing part.
Pages are reference-counted, so forks can share them.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.cache.parts import GrowingPart
from model.errors import CacheError

if TYPE_CHECKING:
    from model.config import ModelConfig


def growing_parts(config: ModelConfig) -> dict[tuple[int, str], GrowingPart]:
    """Return the growing parts of all layers, by layer and part name."""
    return {
        (layer, name): part
        for layer, mixer in enumerate(config.mixers)
        for name, part in mixer.cache_parts(config).items()
        if isinstance(part, GrowingPart)
    }


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros that are not an inference tensor, which could only be written to in inference mode."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)


class PagePool:
    """Reference-counted pages for caches of ``config``."""

    def __init__(self, config: ModelConfig, pages: int, device: str | torch.device = "cpu"):
        if pages < 0:
            raise CacheError(f"a pool cannot have {pages} pages")
        self.config = config
        self.device = torch.device(device)
        self.page_tokens = config.page_tokens
        self.parts = growing_parts(config)
        self._rows = {key: self._allocate(part, pages) for key, part in self.parts.items()}
        self._references = [0] * pages
        self._dirty: set[int] = set()
        """Free pages that still have rows of released sequences."""
        self._free = list(range(pages))  # a heap: allocating the lowest first keeps pages contiguous

    def _allocate(self, part: GrowingPart, pages: int) -> Tensor:
        return zeros((pages * self.page_tokens // part.ratio, part.layout.nbytes), torch.uint8, self.device)

    @property
    def pages(self) -> int:
        return len(self._references)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def page_bytes(self, component: str | None = None) -> int:
        """Return the bytes of one page, in total or of one component."""
        return sum(
            self.page_tokens // part.ratio * part.layout.nbytes
            for part in self.parts.values()
            if component in (None, part.component)
        )

    def rows(self, layer: int, name: str) -> Tensor:
        """Return the packed rows of one part in page order: uint8 [pages * rows per page, layout.nbytes]."""
        return self._rows[layer, name]

    def references(self, page: int) -> int:
        """Return the number of tables that hold the page."""
        return self._references[page]

    def check_free(self, count: int) -> None:
        """Raise CacheError unless ``count`` pages are free."""
        if count > len(self._free):
            raise CacheError(
                f"the page pool is exhausted: {count} more needed, {len(self._free)} of {self.pages} free (pages of "
                f"{self.page_tokens} tokens)"
            )

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free pages, with one reference each. Raises CacheError and takes none if fewer are free."""
        self.check_free(count)
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for page in taken:
            self._references[page] = 1
            if page in self._dirty:
                self.clear(page)
        return taken

    def clear(self, page: int) -> None:
        """Zero the page. Masked rows must be finite, and a previous sequence may have left other values."""
        for key, part in self.parts.items():
            self._rows[key].view(self.pages, self.page_tokens // part.ratio, part.layout.nbytes)[page].zero_()
        self._dirty.discard(page)

    def share(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                heapq.heappush(self._free, page)
                self._dirty.add(page)  # cleared on allocation: at interpreter exit, clearing can fail

    def copy(self, page: int) -> int:
        """Exchange a reference to ``page`` for a new page with a copy of its rows."""
        (own,) = self.allocate(1)
        for key, part in self.parts.items():
            rows = self._rows[key].view(self.pages, self.page_tokens // part.ratio, part.layout.nbytes)
            rows[own] = rows[page]
        self.release([page])
        return own

    def grow(self, pages: int) -> None:
        """Add ``pages`` free pages if positive. Moves the rows to a larger allocation."""
        if pages <= 0:
            return
        for key, part in self.parts.items():
            larger = self._allocate(part, self.pages + pages)
            larger[: len(self._rows[key])] = self._rows[key]
            self._rows[key] = larger
        for page in range(self.pages, self.pages + pages):
            heapq.heappush(self._free, page)
        self._references += [0] * pages


class PageTable:
    """Pages and lengths of the sequences of a cache, shared by all layers. Deleting the table releases the pages."""

    def __init__(self, pool: PagePool, sequences: int, reserved: int = 0):
        """Allocate ``reserved`` pages per sequence. More are allocated as tokens arrive."""
        self.pool, self.reserved = pool, reserved
        self.pages: list[list[int]] = []
        self._pages_changed()
        self.pages += [pool.allocate(reserved) for _ in range(sequences)]
        self.lengths = [0] * sequences
        self.has_fixed_shape = False
        """True if a step runs the same operators at the same shapes for all lengths, as recorded steps must. False if
        work that no sequence needs is skipped."""

    def __del__(self) -> None:
        self.release()

    def _pages_changed(self) -> None:
        self._page_ids: Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each sequence, without the current step."""
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: list[int]) -> None:
        self._lengths = lengths
        self._starts: Tensor | None = None
        self.step = 0

    @property
    def step(self) -> int:
        """Number of tokens that the current step appends to every sequence. Setting the lengths ends the step."""
        return self._step

    @step.setter
    def step(self, tokens: int) -> None:
        self._step = tokens
        self._counts: dict[int, tuple[list[int], list[int]]] = {}
        self._ranges: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def starts(self) -> Tensor:
        """Positions of the next tokens: int64 [1] if all sequences have equal lengths, else [B]."""
        if self._starts is None:
            different = self._lengths[:1] if len(set(self._lengths)) == 1 else self._lengths
            self._starts = torch.tensor(different, device=self.pool.device)
        return self._starts

    @property
    def page_ids(self) -> Tensor:
        """Page IDs, int64 [B, pages]. Shorter rows are padded with their first page, or 0."""
        if self._page_ids is None:
            self._page_ids = self._padded_pages(max(map(len, self.pages))).to(self.pool.device)
        return self._page_ids

    def _padded_pages(self, width: int) -> Tensor:
        rows = [pages + (pages[:1] or [0]) * (width - len(pages)) for pages in self.pages]
        return torch.tensor(rows, dtype=torch.int64)

    def bind_inputs(self, starts: Tensor, page_ids: Tensor) -> None:
        """Write the current step's :attr:`starts` and :attr:`page_ids` to tensors, and use these: int64 [B], and [B, n]
        for at most n pages per sequence. Steps then have a fixed shape (:attr:`has_fixed_shape`)."""
        self._starts = starts.copy_(torch.tensor(self._lengths))
        if self._page_ids is not page_ids:
            self._page_ids = page_ids.copy_(self._padded_pages(page_ids.shape[1]))
        self._ranges, self.has_fixed_shape = {}, True

    def unbind_inputs(self) -> None:
        """Stop using the tensors of :meth:`bind_inputs`."""
        self._starts = self._page_ids = None
        self._ranges, self.has_fixed_shape = {}, False

    @property
    def new_lengths(self) -> list[int]:
        """Number of tokens of each sequence after the current step."""
        return self.entry_counts(1)[1]

    def entry_ranges(self, ratio: int) -> tuple[Tensor, Tensor]:
        """Return :meth:`entry_counts` as tensors on the device, int64 [B or 1] each."""
        if ratio not in self._ranges:
            self._ranges[ratio] = self.starts // ratio, (self.starts + self._step) // ratio
        return self._ranges[ratio]

    def may_complete(self, ratio: int) -> bool:
        """Return whether the current step may complete a block of ``ratio`` tokens."""
        before, after = self.entry_counts(ratio)
        return self.has_fixed_shape or before != after

    def entry_counts(self, ratio: int) -> tuple[list[int], list[int]]:
        """Return each sequence's number of entries of ``ratio`` tokens before and after the current step."""
        if ratio not in self._counts:
            step = self._step
            self._counts[ratio] = [n // ratio for n in self._lengths], [(n + step) // ratio for n in self._lengths]
        return self._counts[ratio]

    def begin(self, tokens: int) -> None:
        """Prepare unshared pages for ``tokens`` more tokens of every sequence. Raises CacheError and changes nothing if
        the pool has too few pages."""
        if self.pool.parts:
            self._own_pages(tokens)
        self.step = tokens

    def _plan(self, tokens: int) -> tuple[list[tuple[int, int]], list[int], int]:
        """Plan the pages for ``tokens`` more tokens of every sequence.

        Return the (sequence, index) of shared pages to be copied, the number of pages to append to each sequence, and
        the total number of pages to allocate."""
        shared: list[tuple[int, int]] = []
        missing = []
        size, references = self.pool.page_tokens, self.pool.references
        for sequence, (pages, length) in enumerate(zip(self.pages, self._lengths)):
            end, owned = -(-(length + tokens) // size), len(pages)
            missing.append(end - owned if end > owned else 0)
            for index in range(length // size, min(end, owned)):
                if references(pages[index]) > 1:
                    shared.append((sequence, index))
        if not shared:
            return shared, missing, sum(missing)
        # The last holder of a page keeps it.
        holders = Counter(self.pages[sequence][index] for sequence, index in shared)
        copies = sum(n - (n == self.pool.references(page)) for page, n in holders.items())
        needed = sum(missing) + copies
        return shared, missing, needed

    def missing_pages(self, tokens: int) -> int:
        """Return the number of pages to allocate for ``tokens`` more tokens of every sequence."""
        return self._plan(tokens)[2] if self.pool.parts else 0

    def check_room(self, tokens: int) -> None:
        """Raise CacheError unless the pool has enough pages for ``tokens`` more tokens of every sequence."""
        if not self.reserved:
            self.pool.check_free(self.missing_pages(tokens))

    def _own_pages(self, tokens: int) -> None:
        shared, missing, needed = self._plan(tokens)
        if not needed:
            return
        if self.reserved:
            self.pool.grow(needed - self.pool.free_pages)
        self.pool.check_free(needed)
        for sequence, index in shared:
            pages = self.pages[sequence]
            if self.pool.references(pages[index]) > 1:
                pages[index] = self.pool.copy(pages[index])
        for pages, count in zip(self.pages, missing):
            pages += self.pool.allocate(count)
        self._pages_changed()

    def advance(self) -> None:
        """Add the current step's tokens to the lengths."""
        self.lengths = [n + self.step for n in self._lengths]

    def truncate(self, lengths: list[int]) -> None:
        """Truncate to ``lengths`` tokens and release pages beyond them that are not reserved."""
        for pages, length, before in zip(self.pages, lengths, self._lengths):
            kept = max(self.reserved, self.pool.pages_for(length))
            if not length:
                for page in pages[: min(kept, self.pool.pages_for(before))]:
                    if self.pool.references(page) == 1:
                        self.pool.clear(page)
            if len(pages) > kept:
                self.pool.release(pages[kept:])
                del pages[kept:]
                self._pages_changed()
        self.lengths = lengths

    def fork_into(self, other: PageTable, sequences: Sequence[int]) -> None:
        """Copy ``sequences`` into an empty table, sharing the pages in use and reserving equally many."""
        used = [self.pages[i][: self.pool.pages_for(self._lengths[i])] for i in sequences]
        other.reserved = self.reserved
        if self.reserved:  # the rest, and one page to copy each half-filled page to
            self.pool.grow(sum(self.reserved - len(pages) + 1 for pages in used) - self.pool.free_pages)
        for pages in used:
            self.pool.share(pages)
        other.pages = [pages + self.pool.allocate(max(0, self.reserved - len(pages))) for pages in used]
        other.lengths = [self._lengths[i] for i in sequences]
        other._pages_changed()

    def adopt(self, sequences: Sequence[tuple[PageTable, int]]) -> None:
        """Move sequences from other tables of the pool into this empty table, with their pages."""
        self.pages = [table.pages[i] for table, i in sequences]
        self.lengths = [table.lengths[i] for table, i in sequences]
        self._pages_changed()
        self.reserved = min(table.reserved for table, _ in sequences)
        for table, i in sequences:
            table.pages[i] = []
            table._pages_changed()
            table.lengths = [0 if k == i else n for k, n in enumerate(table.lengths)]

    def release(self) -> None:
        """Remove all tokens and release all pages, including reserved ones."""
        for pages in self.pages:
            self.pool.release(pages)
        self.pages = [[] for _ in self.pages]
        self._pages_changed()
        self.reserved = 0
        self.lengths = [0] * len(self.pages)
