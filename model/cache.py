"""The mixed-precision cache: packed compressed entries in pages, plus a fixed-size state per sequence.

Growing parts hold one packed row per entry, in pages of a pool (:mod:`model.paging`). The fixed state is, per layer,
the sliding window (packed like entries) and, per compressor, the projected rows of the newest tokens: what unfinished
blocks and overlaps still need. What is read back equals what training's fake quantisation produced, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from model.cache_parts import LayerCache, Ring
from model.config import ModelConfig
from model.errors import CacheError
from model.paging import PagePool, PageTable

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
        reserved = 0 if pool is not None else -(-max_tokens // config.page_tokens)
        self.pool = pool if pool is not None else PagePool(config, batch_size * reserved, device)
        self.device = self.pool.device
        self._table = PageTable(self.pool, batch_size, reserved)
        self.written = [0] * batch_size
        """How far each sequence's rings were ever written: they hold the rows up to their capacity before that."""
        # The layers know the table and not the cache: a cycle would keep the memory of a forgotten cache for a while.
        self.layers = [LayerCache(config, layer, self._table, rewind) for layer in range(config.num_layers)]

    # --- lengths

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens held, of each sequence."""
        return list(self._table.lengths)

    @property
    def length(self) -> int:
        """Tokens held, where all sequences hold as many. Raises CacheError where they do not."""
        if len(set(self._table.lengths)) > 1:
            raise CacheError(f"the sequences have different lengths: {self.lengths}")
        return self._table.lengths[0]

    @property
    def starts(self) -> Tensor:
        """Positions of the next tokens: int64 [1] where all sequences are equally long, else [B]."""
        return self._table.starts

    # --- a step of the network

    def begin(self, batch_size: int, tokens: int) -> None:
        """Make room for ``tokens`` more tokens of each sequence. Raises CacheError, and changes nothing, when they do
        not fit, the pool has too few pages, or an interrupted step has damaged the fixed state."""
        self._check_lengths(batch_size, tokens)
        self._table.begin(tokens)
        self.written = [max(written, n + tokens) for written, n in zip(self.written, self._table.lengths)]

    def check_room(self, batch_size: int, tokens: int) -> None:
        """Raise CacheError unless [batch_size, tokens] more ids fit and the pool has the pages."""
        self._check_lengths(batch_size, tokens)
        self._table.check_room(tokens)

    def _check_lengths(self, batch_size: int, tokens: int) -> None:
        if batch_size != self.batch_size:
            raise CacheError(f"the cache holds {self.batch_size} sequences, the input has {batch_size}")
        for sequence, length in enumerate(self._table.lengths):
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
        self._table.advance()

    # --- sizes

    def nbytes(self, component: str | None = None) -> int:
        """Bytes of the real storages: all, or one of :data:`COMPONENTS`. A page held twice counts once."""
        if component is not None and component not in COMPONENTS:
            raise CacheError(f"component '{component}' is not one of {', '.join(COMPONENTS)}")
        pages = len({page for pages in self._table.pages for page in pages})
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
        for sequence, (target, length) in enumerate(zip(targets, self._table.lengths)):
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
                self.written[sequence] = 0
                for ring in self._rings():
                    ring.data[sequence].zero_()  # what a mask hides must be finite
        self._table.truncate(targets)

    def _restorable(self, sequence: int, length: int) -> bool:
        """Whether the rings still hold all that tokens from position ``length`` on will need."""
        written = self.written[sequence]
        return length == 0 or all(
            max(0, part.first_needed(length)) >= written - part.ring.capacity
            for layer in self.layers
            for part in layer.ring_parts()
        )

    def release(self) -> None:
        """Forget all tokens and give the pages back. A cache that nobody holds any more does so by itself."""
        self._table.release()
        self.written = [0] * self.batch_size
        for ring in self._rings():
            ring.data.zero_()

    def fork(self) -> Cache:
        """A second cache that goes on from here on its own. Pages are shared until one of the two writes to them."""
        twin = self._like(self.batch_size)
        self._table.fork_into(twin._table)
        twin.written = list(self.written)
        for ours, theirs in zip(self._rings(), twin._rings()):
            theirs.data.copy_(ours.data)
        return twin

    @classmethod
    def join(cls, caches: Iterable[Cache]) -> Cache:
        """One cache of all sequences of ``caches``, which share a pool and are left empty."""
        caches = list(caches)
        if not caches or len({id(cache) for cache in caches}) < len(caches):
            raise CacheError("joining takes at least one cache, and each only once")
        first = caches[0]
        for cache in caches:
            if cache.pool is not first.pool or cache.rewind != first.rewind:
                raise CacheError("only caches of one page pool and one rewind can be joined")
        whole = first._like(sum(cache.batch_size for cache in caches))
        whole.max_tokens = max(cache.max_tokens for cache in caches)
        for i, ring in enumerate(whole._rings()):
            torch.cat([cache._rings()[i].data for cache in caches], out=ring.data)
        whole.written = [n for cache in caches for n in cache.written]
        whole._table.adopt([(cache._table, i) for cache in caches for i in range(cache.batch_size)])
        for cache in caches:
            cache.written = [0] * cache.batch_size
        return whole

    def split(self) -> list[Cache]:
        """One cache for each sequence, in order; this one is left empty."""
        parts = [self._like(1) for _ in range(self.batch_size)]
        for sequence, part in enumerate(parts):
            part.written = [self.written[sequence]]
            for ours, theirs in zip(self._rings(), part._rings()):
                theirs.data.copy_(ours.data[sequence : sequence + 1])
            part._table.adopt([(self._table, sequence)])
        self.written = [0] * self.batch_size
        return parts

    def _like(self, batch_size: int) -> Cache:
        """An empty cache of the same kind, without pages."""
        return Cache(self.config, batch_size, self.max_tokens, pool=self.pool, rewind=self.rewind)

    def _rings(self) -> list[Ring]:
        return [part.ring for layer in self.layers for part in layer.ring_parts()]
