"""Pages: the shared store in which the growing part of caches lies (report 3.5.1).

A page covers ``config.page_tokens`` tokens of one sequence, in every layer: so many packed rows of each growing part.
Sequences hold page numbers, counted, so that forks can share them.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
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
    """Storage of a cache. Not an inference tensor, which could be written to in inference mode only."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)


class PagePool:
    """``pages`` pages for caches of ``config``; those that hold any count one reference each."""

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
        """Free pages with rows of sequences that are gone."""
        self._free = list(range(pages))  # a heap: the lowest first keeps a sequence's pages together

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
        """Bytes of one page: all, or those of one component."""
        return sum(
            self.page_tokens // part.ratio * part.layout.nbytes
            for part in self.parts.values()
            if component in (None, part.component)
        )

    def rows(self, layer: int, name: str) -> Tensor:
        """The packed rows of one part, page after page: uint8 [pages * rows per page, layout.nbytes]."""
        return self._rows[layer, name]

    def references(self, page: int) -> int:
        """How many tables hold the page."""
        return self._references[page]

    def check_free(self, count: int) -> None:
        """Raises CacheError unless ``count`` pages are free."""
        if count > len(self._free):
            raise CacheError(
                f"the page pool is exhausted: {count} more pages of {self.page_tokens} tokens are needed, "
                f"{len(self._free)} of {self.pages} are free"
            )

    def allocate(self, count: int) -> list[int]:
        """``count`` free pages, each with one reference. Raises CacheError, and takes none, when there are fewer."""
        self.check_free(count)
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for page in taken:
            self._references[page] = 1
            if page in self._dirty:
                self.clear(page)
        return taken

    def clear(self, page: int) -> None:
        """Zero the page: rows that a mask hides must be finite, whatever the sequence before left."""
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
                self._dirty.add(page)  # cleared when it is taken: not here, where nothing may be left to clear with

    def copy(self, page: int) -> int:
        """A page of one's own with the same rows, in exchange for the reference to ``page``."""
        (own,) = self.allocate(1)
        for key, part in self.parts.items():
            rows = self._rows[key].view(self.pages, self.page_tokens // part.ratio, part.layout.nbytes)
            rows[own] = rows[page]
        self.release([page])
        return own

    def grow(self, pages: int) -> None:
        """Add free pages, if more than 0. The rows move to a larger allocation."""
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
    """Which pages hold which sequence, and how far each has been read: what every layer of a cache has in common.

    Pages go back to the pool when the table is forgotten.
    """

    def __init__(self, pool: PagePool, sequences: int, reserved: int = 0):
        """``reserved`` pages of the pool for each sequence from the start; more are taken as tokens come."""
        self.pool, self.reserved = pool, reserved
        self.pages: list[list[int]] = []
        self._pages_changed()
        self.pages += [pool.allocate(reserved) for _ in range(sequences)]
        self.lengths = [0] * sequences
        self.step = 0
        """Tokens that are being appended to every sequence."""

    def __del__(self) -> None:
        self.release()

    def _pages_changed(self) -> None:
        self._page_ids: Tensor | None = None
        self._contiguous: list[bool] | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens read of each sequence."""
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: list[int]) -> None:
        self._lengths = lengths
        self._starts: Tensor | None = None

    @property
    def starts(self) -> Tensor:
        """Positions of the next tokens: int64 [1] where all sequences are equally long, else [B]."""
        if self._starts is None:
            different = self._lengths[:1] if len(set(self._lengths)) == 1 else self._lengths
            self._starts = torch.tensor(different, device=self.pool.device)
        return self._starts

    @property
    def page_ids(self) -> Tensor:
        """Page numbers, int64 [B, most pages]; shorter rows are filled up with their own first page."""
        if self._page_ids is None:
            most = max(map(len, self.pages))
            rows = [pages + pages[:1] * (most - len(pages)) for pages in self.pages]
            self._page_ids = torch.tensor(rows, dtype=torch.int64, device=self.pool.device)
        return self._page_ids

    def is_contiguous(self, sequence: int) -> bool:
        """Whether the sequence's pages lie one after the other."""
        if self._contiguous is None:
            self._contiguous = [all(b == a + 1 for a, b in pairwise(pages)) for pages in self.pages]
        return self._contiguous[sequence]

    @property
    def new_lengths(self) -> list[int]:
        """Tokens of each sequence after the present step."""
        return [n + self.step for n in self._lengths]

    def entry_counts(self, ratio: int) -> tuple[list[int], list[int]]:
        """How many entries of ``ratio`` tokens each sequence had before the present step, and has after it."""
        return [n // ratio for n in self._lengths], [(n + self.step) // ratio for n in self._lengths]

    def begin(self, tokens: int) -> None:
        """Own the pages that the next ``tokens`` tokens of every sequence will be written to, sharing none of them.
        Raises CacheError, and changes nothing, when the pool has too few pages."""
        if self.pool.parts:
            self._own_pages(tokens)
        self.step = tokens

    def _plan(self, tokens: int) -> tuple[list[tuple[int, int]], list[int], int]:
        """What ``tokens`` more tokens of every sequence are written to: the places of shared pages, the number of pages
        missing at each sequence's end, and how many pages all that takes."""
        shared: list[tuple[int, int]] = []
        missing = []
        for sequence, (pages, length) in enumerate(zip(self.pages, self._lengths)):
            end = self.pool.pages_for(length + tokens)
            missing.append(max(0, end - len(pages)))
            touched = range(length // self.pool.page_tokens, min(end, len(pages)))
            shared += [(sequence, place) for place in touched if self.pool.references(pages[place]) > 1]
        # The last of a page's holders keeps it.
        holders = Counter(self.pages[sequence][place] for sequence, place in shared)
        copies = sum(n - (n == self.pool.references(page)) for page, n in holders.items())
        needed = sum(missing) + copies
        return shared, missing, needed

    def check_room(self, tokens: int) -> None:
        """Raise CacheError unless the pool has the pages for ``tokens`` more tokens of every sequence."""
        if self.pool.parts and not self.reserved:
            self.pool.check_free(self._plan(tokens)[2])

    def _own_pages(self, tokens: int) -> None:
        shared, missing, needed = self._plan(tokens)
        if not needed:
            return
        if self.reserved:
            self.pool.grow(needed - self.pool.free_pages)
        self.pool.check_free(needed)
        for sequence, place in shared:
            pages = self.pages[sequence]
            if self.pool.references(pages[place]) > 1:
                pages[place] = self.pool.copy(pages[place])
        for pages, count in zip(self.pages, missing):
            pages += self.pool.allocate(count)
        self._pages_changed()

    def advance(self) -> None:
        """Count the tokens of the step that has been done."""
        self.lengths = [n + self.step for n in self._lengths]
        self.step = 0

    def truncate(self, lengths: list[int]) -> None:
        """Go back to ``lengths`` tokens, and give back the pages beyond them that were not reserved."""
        for pages, length, before in zip(self.pages, lengths, self._lengths):
            kept = max(self.reserved, self.pool.pages_for(length))
            if not length:
                for page in pages[: min(kept, self.pool.pages_for(before))]:
                    if self.pool.references(page) == 1:
                        self.pool.clear(page)
            self.pool.release(pages[kept:])
            del pages[kept:]
        self._pages_changed()
        self.lengths, self.step = lengths, 0

    def fork_into(self, other: PageTable) -> None:
        """Let an empty table go on from here: it shares the pages in use and reserves as many as this one."""
        used = [pages[: self.pool.pages_for(n)] for pages, n in zip(self.pages, self._lengths)]
        other.reserved = self.reserved
        if self.reserved:  # the rest, and one page for each half-filled one to be copied to
            self.pool.grow(sum(self.reserved - len(pages) + 1 for pages in used) - self.pool.free_pages)
        for pages in used:
            self.pool.share(pages)
        other.pages = [pages + self.pool.allocate(max(0, self.reserved - len(pages))) for pages in used]
        other.lengths = list(self._lengths)
        other._pages_changed()

    def adopt(self, sequences: Sequence[tuple[PageTable, int]]) -> None:
        """Take over sequences of other tables of the pool, with their pages, in the place of one's own empty ones."""
        self.pages = [table.pages[i] for table, i in sequences]
        self.lengths = [table.lengths[i] for table, i in sequences]
        self._pages_changed()
        self.reserved = min(table.reserved for table, _ in sequences)
        for table, i in sequences:
            table.pages[i] = []
            table._pages_changed()
            table.lengths = [0 if k == i else n for k, n in enumerate(table.lengths)]

    def release(self) -> None:
        """Forget all tokens and give all pages back, reserved ones too."""
        for pages in self.pages:
            self.pool.release(pages)
        self.pages = [[] for _ in self.pages]
        self._pages_changed()
        self.reserved = 0
        self.lengths, self.step = [0] * len(self.pages), 0
