"""Pages: the shared store in which the growing part of caches lies (report 3.5.1).

A page covers ``config.page_tokens`` tokens of one sequence, in every layer: so many packed rows of each growing part.
Sequences hold page numbers, counted, so that forks can share them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cache_io import EntryLayout
from model.config import ModelConfig
from model.errors import CacheError
from model.precision import Precision, gqa_format


@dataclass(frozen=True)
class GrowingPart:
    """What one layer stores for every ``ratio`` tokens: one row of ``layout.nbytes`` bytes."""

    layout: EntryLayout
    ratio: int
    component: str


def growing_parts(config: ModelConfig) -> dict[tuple[int, str], GrowingPart]:
    """By (layer, part); parts are ``entries`` (csa, hca, gqa) and ``index`` (csa)."""
    precision = Precision(config)
    parts = {}
    for layer, mixer in enumerate(config.layers):
        if mixer == "gqa":
            layout = EntryLayout(2 * config.num_kv_heads * config.head_dim, gqa_format(config))
            parts[layer, "entries"] = GrowingPart(layout, 1, mixer)
        elif mixer != "sliding":
            parts[layer, "entries"] = GrowingPart(precision.main_layout, config.compress_ratio(mixer), mixer)
        if mixer == "csa":
            parts[layer, "index"] = GrowingPart(precision.index_layout, config.csa_ratio, "index")
    return parts


class PagePool:
    """``pages`` pages for caches of ``config``; those that hold any count one reference each."""

    def __init__(self, config: ModelConfig, pages: int, device: str | torch.device = "cpu"):
        self.config = config
        self.device = torch.device(device)
        self.page_tokens = config.page_tokens
        self.parts = growing_parts(config)
        self._rows = {key: self._allocate(part, pages) for key, part in self.parts.items()}
        self._references = [0] * pages
        self._free = list(range(pages))  # a heap: the lowest first keeps a sequence's pages together

    def _allocate(self, part: GrowingPart, pages: int) -> Tensor:
        rows = pages * self.page_tokens // part.ratio
        return torch.zeros(rows, part.layout.nbytes, dtype=torch.uint8, device=self.device)

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

    def shared(self, page: int) -> bool:
        return self._references[page] > 1

    def check_free(self, count: int) -> None:
        """Raises CacheError unless ``count`` pages are free."""
        if count > len(self._free):
            raise CacheError(
                f"the page pool is exhausted: {count} more pages of {self.page_tokens} tokens are needed, "
                f"{len(self._free)} of {self.pages} are free"
            )

    def take(self, count: int) -> list[int]:
        """``count`` free pages, each with one reference. Raises CacheError, and takes none, when there are fewer."""
        self.check_free(count)
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                heapq.heappush(self._free, page)

    def copy(self, page: int) -> int:
        """A page of one's own with the same rows, in exchange for the reference to ``page``."""
        (own,) = self.take(1)
        for key, part in self.parts.items():
            rows = self._rows[key].view(self.pages, self.page_tokens // part.ratio, part.layout.nbytes)
            rows[own] = rows[page]
        self.release([page])
        return own

    def grow(self, pages: int) -> None:
        """Add free pages. The rows move to a larger allocation."""
        for key, part in self.parts.items():
            self._rows[key] = torch.cat((self._rows[key], self._allocate(part, pages)))
        for page in range(self.pages, self.pages + pages):
            heapq.heappush(self._free, page)
        self._references += [0] * pages
