"""The mixed-precision cache: packed compressed entries in pages, plus a fixed-size state per sequence.

Growing parts hold one packed row per entry, in pages of a pool (:mod:`model.paging`). The fixed state is, per layer,
the sliding window (packed like entries) and, per compressor, the projected rows of the newest tokens: what unfinished
blocks and overlaps still need. What is read back equals what training's fake quantisation produced, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.cache_parts import LayerCache, Ring
from model.config import ModelConfig
from model.errors import CacheError
from model.paging import PagePool

COMPONENTS = ("csa", "hca", "index", "gqa", "window", "tail")


class Cache:
    """State of ``batch_size`` sequences, each of its own length, for :class:`model.transformer.Transformer`.

    Without a ``pool`` room for ``max_tokens`` per sequence is allocated at once; with one, pages are taken from it as
    tokens come, and :meth:`release` gives them back. ``rewind`` is how many of the newest tokens :meth:`truncate` can
    always take back; it makes the fixed state that much longer.

    Raises CacheError for sizes that cannot be, or beyond the model's positions.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_tokens: int,
        device: str | torch.device = "cpu",
        *,
        pool: PagePool | None = None,
        rewind: int = 0,
    ):
        if batch_size < 1 or max_tokens < 1 or rewind < 0:
            raise CacheError(
                "a cache needs at least 1 sequence, 1 token and a rewind of 0, "
                f"asked for {batch_size}, {max_tokens} and {rewind}"
            )
        if max_tokens > config.max_positions:
            raise CacheError(f"{max_tokens} tokens exceed the model's max_positions of {config.max_positions}")
        if pool is not None and pool.config != config:
            raise CacheError("the page pool was made for another model configuration")
        self.config, self.max_tokens, self.rewind = config, max_tokens, rewind
        self._reserved = 0 if pool is not None else -(-max_tokens // config.page_tokens)
        """Pages that every sequence has from the start."""
        self.pool = pool if pool is not None else PagePool(config, batch_size * self._reserved, device)
        self.device = self.pool.device
        self.lengths = [0] * batch_size
        self._written = [0] * batch_size
        """How far each sequence's rings were ever written: they hold the rows up to their capacity before that."""
        self._tables = [self.pool.take(self._reserved) for _ in range(batch_size)]
        self._table_tensor: Tensor | None = None
        self._step = 0
        self.layers = [LayerCache(self, layer, batch_size) for layer in range(config.num_layers)]

    # --- lengths

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Tokens held, where all sequences hold as many. Raises CacheError where they do not."""
        if len(set(self.lengths)) > 1:
            raise CacheError(f"the sequences have different lengths: {self.lengths}")
        return self.lengths[0]

    @property
    def starts(self) -> Tensor:
        """Positions of the next tokens: int64 [1] where all sequences are equally long, else [B]."""
        lengths = self.lengths[:1] if len(set(self.lengths)) == 1 else self.lengths
        return torch.tensor(lengths, device=self.device)

    def entry_counts(self, ratio: int) -> tuple[list[int], list[int]]:
        """How many entries of ``ratio`` tokens each sequence had before the present step, and has after it."""
        return [n // ratio for n in self.lengths], [(n + self._step) // ratio for n in self.lengths]

    # --- a step of the network

    def begin(self, batch_size: int, tokens: int) -> None:
        """Make room for ``tokens`` more tokens of each sequence. Raises CacheError, and changes nothing, when they do
        not fit, the pool has too few pages, or an interrupted step has damaged the fixed state."""
        self.check_room(batch_size, tokens)
        self._own_pages(tokens)
        self._step = tokens
        self._written = [max(written, n + tokens) for written, n in zip(self._written, self.lengths)]

    def check_room(self, batch_size: int, tokens: int) -> None:
        """Raise CacheError unless [batch_size, tokens] more ids fit."""
        if batch_size != self.batch_size:
            raise CacheError(f"the cache holds {self.batch_size} sequences, the input has {batch_size}")
        for sequence, length in enumerate(self.lengths):
            if length + tokens > self.max_tokens:
                raise CacheError(
                    f"{tokens} more tokens do not fit: the cache holds {length} of at most {self.max_tokens}"
                )
            if not self._restorable(sequence, length):
                raise CacheError(
                    f"sequence {sequence} cannot go on from {length} tokens: a step was interrupted; truncate it to 0"
                )

    def advance(self) -> None:
        """Count the tokens that every layer has appended since :meth:`begin`."""
        self.lengths = [n + self._step for n in self.lengths]
        self._step = 0

    def _own_pages(self, tokens: int) -> None:
        """Pages for ``tokens`` more tokens; those that will be written are shared with nobody."""
        if not self.pool.parts:
            return
        shared: list[tuple[int, int]] = []
        missing = []
        for sequence, (table, length) in enumerate(zip(self._tables, self.lengths)):
            end = self.pool.pages_for(length + tokens)
            missing.append(max(0, end - len(table)))
            touched = range(length // self.pool.page_tokens, min(end, len(table)))
            shared += [(sequence, place) for place in touched if self.pool.shared(table[place])]
        needed = sum(missing) + len(shared)
        if not needed:
            return
        if self._reserved:
            self.pool.grow(max(0, needed - self.pool.free_pages))
        self.pool.check_free(needed)
        for sequence, place in shared:
            table = self._tables[sequence]
            if self.pool.shared(table[place]):  # not when the others have moved away just now
                table[place] = self.pool.copy(table[place])
        for table, count in zip(self._tables, missing):
            table += self.pool.take(count)
        self._table_tensor = None

    @property
    def tables(self) -> Tensor:
        """Page numbers, int64 [B, most pages]; shorter rows are filled up with their own first page."""
        if self._table_tensor is None:
            most = max(map(len, self._tables))
            rows = [table + table[:1] * (most - len(table)) for table in self._tables]
            self._table_tensor = torch.tensor(rows, device=self.device)
        return self._table_tensor

    def first_of_run(self, pages: int) -> int | None:
        """The first page, where there is one sequence whose first ``pages`` pages lie one after the other."""
        table = self._tables[0]
        if len(self._tables) > 1 or table[:pages] != list(range(table[0], table[0] + pages)):
            return None
        return table[0]

    # --- sizes

    def nbytes(self, component: str | None = None) -> int:
        """Bytes of the real storages: all, or one of :data:`COMPONENTS`. A page held twice counts once."""
        if component is not None and component not in COMPONENTS:
            raise CacheError(f"component '{component}' is not one of {', '.join(COMPONENTS)}")
        pages = len({page for table in self._tables for page in table})
        parts = (part for layer in self.layers for part in layer.ring_parts())
        rings = sum(part.ring.nbytes for part in parts if component in (None, part.component))
        return pages * self.pool.page_bytes(component) + rings

    def bytes_per_token(self) -> float:
        """All bytes of one sequence, fixed state included, over the tokens there is room for."""
        return self.nbytes() / self.batch_size / self.max_tokens

    # --- going back, forking, batching

    def truncate(self, tokens: int | Sequence[int]) -> None:
        """Go back to the first ``tokens`` tokens of every sequence (one number for all, or one for each).

        Entries allow any length; windows and tails keep only the newest tokens, so it can be 0, or as far back as
        they reach. Raises CacheError otherwise, and changes nothing.
        """
        targets = [tokens] * self.batch_size if isinstance(tokens, int) else list(tokens)
        if len(targets) != self.batch_size:
            raise CacheError(f"truncate: {len(targets)} lengths were given for {self.batch_size} sequences")
        for sequence, (target, length) in enumerate(zip(targets, self.lengths)):
            if not 0 <= target <= length:
                raise CacheError(f"cannot truncate to {target} tokens: the cache holds {length}")
            if not self._restorable(sequence, target):
                least = next((n for n in range(target, length + 1) if self._restorable(sequence, n)), 0)
                raise CacheError(
                    f"cannot truncate from {length} to {target} tokens: the sliding window and the compressors' tails "
                    f"reach back to {least} only (a cache with a rewind of more than {self.rewind} keeps more)"
                )
        for sequence, target in enumerate(targets):
            if target == 0:
                self._written[sequence] = 0
            kept = max(self._reserved, self.pool.pages_for(target))
            self.pool.release(self._tables[sequence][kept:])
            del self._tables[sequence][kept:]
        self._table_tensor = None
        self.lengths = targets

    def _restorable(self, sequence: int, length: int) -> bool:
        """Whether the rings still hold all that tokens from position ``length`` on will need."""
        written = self._written[sequence]
        return length == 0 or all(
            max(0, part.first_needed(length)) >= written - part.ring.capacity
            for layer in self.layers
            for part in layer.ring_parts()
        )

    def release(self) -> None:
        """Forget all tokens and give the pages back: for caches of a common pool that are no longer wanted."""
        for table in self._tables:
            self.pool.release(table)
        self._tables = [[] for _ in self._tables]
        self._reserved = 0
        self.truncate(0)

    def fork(self) -> Cache:
        """A second cache that goes on from here on its own. Pages are shared until one of the two writes to them."""
        twin = self._like(self.batch_size)
        twin.lengths, twin._written = list(self.lengths), list(self._written)
        tables = [table[: self.pool.pages_for(n)] for table, n in zip(self._tables, self.lengths)]
        if self._reserved:  # the rest of what was reserved, and one page to copy each half-filled one to
            rest = sum(self._reserved - len(table) + 1 for table in tables)
            self.pool.grow(max(0, rest - self.pool.free_pages))
        for table in tables:
            self.pool.share(table)
        twin._tables = [table + self.pool.take(max(0, self._reserved - len(table))) for table in tables]
        for ours, theirs in zip(self._rings(), twin._rings()):
            theirs.data.copy_(ours.data)
        return twin

    @classmethod
    def join(cls, caches: Sequence[Cache]) -> Cache:
        """One cache of all sequences of ``caches``, which have one pool and are left empty."""
        first = caches[0]
        for cache in caches:
            if cache.pool is not first.pool or cache.rewind != first.rewind:
                raise CacheError("only caches of one page pool and one rewind can be joined")
        whole = first._like(sum(cache.batch_size for cache in caches))
        whole._reserved = min(cache._reserved for cache in caches)
        whole.max_tokens = max(cache.max_tokens for cache in caches)
        for i, ring in enumerate(whole._rings()):
            ring.data.copy_(torch.cat([cache._rings()[i].data for cache in caches]))
        whole.lengths = [n for cache in caches for n in cache.lengths]
        whole._written = [n for cache in caches for n in cache._written]
        whole._tables = [table for cache in caches for table in cache._tables]
        for cache in caches:
            cache._hand_over()
        return whole

    def split(self) -> list[Cache]:
        """One cache for each sequence, in order; this one is left empty."""
        parts = []
        for sequence, table in enumerate(self._tables):
            part = self._like(1)
            part.lengths, part._written = [self.lengths[sequence]], [self._written[sequence]]
            part._tables = [table]
            for ours, theirs in zip(self._rings(), part._rings()):
                theirs.data.copy_(ours.data[sequence : sequence + 1])
            parts.append(part)
        self._hand_over()
        return parts

    def _like(self, batch_size: int) -> Cache:
        """An empty cache of the same kind, without pages."""
        twin = Cache(self.config, batch_size, self.max_tokens, pool=self.pool, rewind=self.rewind)
        twin._reserved = self._reserved
        return twin

    def _hand_over(self) -> None:
        """Empty this cache without giving back its pages, which others hold now."""
        self._tables = [[] for _ in self._tables]
        self.release()

    def _rings(self) -> list[Ring]:
        return [part.ring for layer in self.layers for part in layer.ring_parts()]
