"""Prefixes of earlier prompts, kept so that prompts with the same beginning need not be read again.

A prefix is a whole number of pages, so that it ends at a block boundary of every compression ratio. A kept prefix is a
fork of a completion's cache. It shares the completion's pages and has a copy of its fixed state (windows, compressor
tails and recurrent states), without which no later token could be computed. The copy is the cost of a kept prefix.
Therefore not every boundary is kept (compare periodic checkpointing in report 3.5.2), but only

* the last page boundary of every prompt;
* every ``KEPT_EVERY`` tokens of a prompt;
* the boundary where a prompt leaves the tokens of earlier prompts, once that has been seen to happen.

A prompt continues from its longest kept prefix.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence

from model.cache import Cache
from model.cache.pages import PagePool

KEPT_EVERY = 4096
"""Tokens between kept prefixes of a long prompt, rounded up to a whole number of pages."""
_SEEN_PAGES = 1 << 16
"""Number of page boundaries of earlier prompts that are remembered by their digests."""


class PrefixCache:
    """At most ``capacity`` kept prefixes, the least recently used of which are dropped first."""

    def __init__(self, page_tokens: int, capacity: int):
        self.page_tokens, self.capacity = page_tokens, capacity
        self._kept: OrderedDict[bytes, Cache] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def digests(self, tokens: Sequence[int]) -> list[bytes]:
        """Return a digest of the tokens up to each page boundary that leaves at least one token to compute."""
        if not self.capacity:
            return []
        digests: list[bytes] = []
        state = hashlib.blake2b(digest_size=16)
        for start in range(0, (len(tokens) - 1) // self.page_tokens * self.page_tokens, self.page_tokens):
            state.update(array("q", tokens[start : start + self.page_tokens]).tobytes())
            digests.append(state.copy().digest())
        return digests

    def find(self, digests: Sequence[bytes]) -> Cache | None:
        """Return the longest kept prefix of a prompt with ``digests``. A completion continues from a fork of it."""
        for digest in reversed(digests if self._kept else []):
            if digest in self._kept:
                self._kept.move_to_end(digest)
                return self._kept[digest]
        return None

    def boundaries(self, digests: Sequence[bytes]) -> dict[int, bytes]:
        """Return the prefixes to keep of a prompt with ``digests``, in ascending order: their digests by length in
        tokens. Remember the pages of the prompt."""
        interval = -(-KEPT_EVERY // self.page_tokens)
        shared = sum(digest in self._seen for digest in digests)  # the first pages, unless some were forgotten
        for digest in digests:
            self._seen[digest] = None
            self._seen.move_to_end(digest)
        while len(self._seen) > _SEEN_PAGES:
            self._seen.popitem(last=False)
        counts = {len(digests), shared, *range(interval, len(digests), interval)} - {0}
        ends = {count * self.page_tokens: digests[count - 1] for count in sorted(counts)}
        return {length: digest for length, digest in ends.items() if digest not in self._kept}

    def keep(self, digest: bytes, cache: Cache) -> None:
        """Keep the tokens with ``digest``, which ``cache`` holds."""
        self._kept[digest] = cache.fork()
        self._kept.move_to_end(digest)
        while len(self._kept) > self.capacity:
            self.evict()

    def evict(self) -> None:
        """Drop the least recently used prefix."""
        self._kept.popitem(last=False)

    def evictable_pages(self, pool: PagePool, spared: Cache | None = None) -> int:
        """Return the number of pages that are used by kept prefixes only, without those of the prefix ``spared``."""
        holders = Counter(page for cache in self._kept.values() for page in cache.pages[0])
        needed = set() if spared is None else set(spared.pages[0])
        return sum(pool.references(page) == count for page, count in holders.items() if page not in needed)
