"""The mixed-precision cache: packed compressed entries in pages, plus fixed-size state per sequence.

Growing parts hold one packed row per entry, in pages of a pool (:mod:`model.cache.pages`). Fixed state is the sliding
window of a layer (packed like entries), the rows of tokens in unfinished or overlapping blocks of a compressor, and
recurrent state. Values read from the cache equal those of fake quantization in training, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.cache.layer_cache import FixedState, LayerCache
from model.cache.pages import PagePool, PageTable, zeros
from model.cache.ring import Ring
from model.errors import CacheError

if TYPE_CHECKING:
    from model.config import ModelConfig


class Cache:
    """Cache of ``batch_size`` sequences with separate lengths, for :class:`model.transformer.Transformer`.

    Without a ``pool``, memory for ``max_tokens`` per sequence is allocated up front. With one, pages are allocated as
    tokens arrive and freed by :meth:`release`. ``rewind`` is the number of newest tokens that :meth:`truncate` can
    always remove; the fixed state keeps that many more tokens. ``predicts_ahead`` adds a cache of the multi-token
    prediction module (:meth:`model.transformer.Transformer.read_ahead`).

    Raises CacheError if a size is invalid or exceeds the model's positions.
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
        predicts_ahead: bool = False,
    ):
        if batch_size < 1 or max_tokens < 1 or rewind < 0:
            raise CacheError(
                "a cache needs at least 1 sequence, 1 token and a rewind of 0, "
                f"asked for {batch_size}, {max_tokens} and {rewind}"
            )
        if max_tokens > config.max_positions:
            raise CacheError(f"{max_tokens} tokens exceed the model's max_positions of {config.max_positions}")
        if pool is not None and pool.config != config:
            raise CacheError("the page pool was created for another model configuration")
        self.config, self.max_tokens, self.rewind = config, max_tokens, rewind
        reserved = 0 if pool is not None else -(-max_tokens // config.page_tokens)
        self.pool = pool if pool is not None else PagePool(config, batch_size * reserved, device)
        self.device = self.pool.device
        self._table = PageTable(self.pool, batch_size, reserved)
        self.high_water_marks = [0] * batch_size
        """Highest length each sequence has had. Rings hold the rows before it, up to their capacity."""
        # Layers refer to the table instead of the cache: a reference cycle would delay freeing the memory.
        caches = [
            LayerCache(mixer.cache_parts(config), layer, self._table, rewind)
            for layer, mixer in enumerate(config.block_mixers if predicts_ahead else config.mixers)
        ]
        self.layers = caches[: config.num_layers]
        self.ahead = caches[-1] if predicts_ahead and config.mtp_layers else None
        """Cache of the multi-token prediction module."""
        self.bound_to: Sequence[Tensor] | None = None
        """The ``memory`` passed to :meth:`bind_state`; None after :meth:`unbind_state`."""
        self._recurrent = [state for state in self._fixed() if not isinstance(state, Ring)]

    @property
    def all_layers(self) -> list[LayerCache]:
        """Caches of the layers, and then of the multi-token prediction module if there is one."""
        return self.layers if self.ahead is None else [*self.layers, self.ahead]

    # --- lengths

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each sequence."""
        return list(self._table.lengths)

    @property
    def length(self) -> int:
        """Common number of tokens of all sequences. Raises CacheError if their lengths differ."""
        if len(set(self._table.lengths)) > 1:
            raise CacheError(f"the sequences have different lengths: {self.lengths}")
        return self._table.lengths[0]

    @property
    def starts(self) -> Tensor:
        """Positions of the next tokens: int64 [1] if all sequences have equal lengths, else [B]."""
        return self._table.starts

    @property
    def pages(self) -> list[list[int]]:
        """Page IDs of each sequence in the pool, in order."""
        return [list(pages) for pages in self._table.pages]

    @property
    def max_pages(self) -> int:
        """Number of pages of the sequence that has the most."""
        return max(map(len, self._table.pages))

    # --- a step of the network

    def begin(self, batch_size: int, tokens: int) -> None:
        """Make room for ``tokens`` more tokens of each sequence. Raises CacheError and changes nothing if they do not
        fit, the pool has too few pages, or an interrupted step has damaged the fixed state."""
        self._check_lengths(batch_size, tokens)
        self._table.begin(tokens)
        self.high_water_marks = [max(mark, n + tokens) for mark, n in zip(self.high_water_marks, self._table.lengths)]

    def check_room(self, batch_size: int, tokens: int) -> None:
        """Raise CacheError unless [batch_size, tokens] more IDs fit and the pool has enough pages."""
        self._check_lengths(batch_size, tokens)
        self._table.check_room(tokens)

    def missing_pages(self, tokens: int) -> int:
        """Return the number of pages that ``tokens`` more tokens of every sequence would take from the pool."""
        return self._table.missing_pages(tokens)

    def _check_lengths(self, batch_size: int, tokens: int) -> None:
        if batch_size != self.batch_size:
            raise CacheError(f"the cache holds {self.batch_size} sequences, the input has {batch_size}")
        for sequence, length in enumerate(self._table.lengths):
            if length + tokens > self.max_tokens:
                raise CacheError(
                    f"{tokens} more tokens do not fit: the cache holds {length} of at most {self.max_tokens}"
                )
            # Without an interrupted step or a truncation, the state ends at the length.
            if length < self.high_water_marks[sequence] and not self._can_resume_at(sequence, length):
                raise CacheError(
                    f"sequence {sequence} cannot continue from {length} tokens: a step was interrupted; truncate to 0"
                )

    def advance(self) -> None:
        """Count the tokens that every layer has appended since :meth:`begin`."""
        self._table.advance()

    # --- steps at fixed addresses

    def fixed_memory(self, batch_size: int) -> list[Tensor]:
        """Allocate the fixed state of ``batch_size`` sequences except recurrent states, for :meth:`bind_state`."""
        rows = (ring.data for ring in self._rings())
        return [zeros((batch_size, *x.shape[1:]), x.dtype, x.device) for x in rows]

    def bind_state(self, memory: Sequence[Tensor]) -> None:
        """Move the fixed state, except recurrent states, to the first rows of ``memory``."""
        self.bound_to = memory
        for ring, rows in zip(self._rings(), memory, strict=True):
            ring.data = rows[: self.batch_size].copy_(ring.data)

    def unbind_state(self) -> None:
        """Move the fixed state to memory of its own, and stop using the tensors of :meth:`bind_inputs`."""
        self.bound_to = None
        with torch.inference_mode(False):  # inference tensors could only be written to in inference mode
            for ring in self._rings():
                ring.data = ring.data.clone()
        self._table.unbind_inputs()

    def bind_inputs(self, starts: Tensor, page_ids: Tensor) -> None:
        """Keep the positions of the next tokens, int64 [B], and the page IDs, int64 [B, at least the pages of every
        sequence], in these tensors for the step that was begun. The step then runs the same operators for all
        lengths."""
        self._table.bind_inputs(starts, page_ids)

    def _rings(self) -> list[Ring]:
        return [state for state in self._fixed() if isinstance(state, Ring)]

    # --- sizes

    @property
    def components(self) -> tuple[str, ...]:
        """Components that :meth:`nbytes` reports separately."""
        fixed = (state.part.component for state in self._fixed())
        return tuple(dict.fromkeys((*(part.component for part in self.pool.parts.values()), *fixed)))

    def nbytes(self, component: str | None = None) -> int:
        """Return the allocated bytes, in total or of one of :attr:`components`. Shared pages count once. Raises
        CacheError for an unknown component."""
        if component is not None and component not in self.components:
            raise CacheError(f"component '{component}' is not one of {', '.join(self.components)}")
        pages = len({page for pages in self._table.pages for page in pages})
        fixed = sum(
            tensor.numel() * tensor.element_size()
            for state in self._fixed()
            if component in (None, state.part.component)
            for tensor in state.tensors().values()
        )
        return pages * self.pool.page_bytes(component) + fixed

    def bytes_per_token(self) -> float:
        """Return the bytes per sequence, fixed state included, divided by ``max_tokens``."""
        return self.nbytes() / self.batch_size / self.max_tokens

    # --- truncating, forking, batching

    def truncate(self, tokens: int | Sequence[int]) -> None:
        """Keep the first ``tokens`` tokens of every sequence. ``tokens`` is one length, or one per sequence.

        Entries allow any length. Windows and compressor states only have the newest tokens, and recurrent states only
        exist at the ends of calls. Raises CacheError and changes nothing if they cannot resume at the length; 0 is
        always possible.
        """
        targets = [tokens] * self.batch_size if isinstance(tokens, int) else list(tokens)
        if len(targets) != self.batch_size:
            raise CacheError(f"truncate: {len(targets)} lengths given for {self.batch_size} sequences")
        for sequence, (target, length) in enumerate(zip(targets, self._table.lengths)):
            if not 0 <= target <= length:
                raise CacheError(f"cannot truncate to {target} tokens: the cache holds {length}")
            if not self._can_resume_at(sequence, target):
                earliest = next((n for n in range(target, length + 1) if self._can_resume_at(sequence, n)), 0)
                raise CacheError(
                    f"cannot truncate from {length} to {target} tokens: {self._limit(sequence, target)} can resume at "
                    f"{earliest} or later only (a cache with a rewind of more than {self.rewind} keeps more)"
                )
        for sequence, target in enumerate(targets):
            if target == 0:
                self.high_water_marks[sequence] = 0
            for state in self._recurrent if target else self._fixed():
                state.truncate(sequence, target)
        self._table.truncate(targets)

    @contextmanager
    def at(self, starts: list[int], tokens: int) -> Iterator[None]:
        """Context manager in which :attr:`ahead` reads and writes ``tokens`` rows per sequence from ``starts`` on.

        These positions lie within ``rewind`` tokens of the sequences' ends.
        """
        table = self._table
        lengths = table.lengths
        table.lengths = starts
        table.step = tokens
        try:
            yield
        finally:
            table.lengths = lengths

    def _can_resume_at(self, sequence: int, length: int) -> bool:
        """Return whether the fixed state has everything that tokens from position ``length`` on need."""
        mark = self.high_water_marks[sequence]
        # Rings keep ``rewind`` more tokens than they need.
        states = self._recurrent if length >= mark - self.rewind else self._fixed()
        return length == 0 or all(state.can_resume_at(sequence, length, mark) for state in states)

    def _limit(self, sequence: int, length: int) -> str:
        """Return the names of the kinds of state that cannot resume at ``length``."""
        mark = self.high_water_marks[sequence]
        kinds = {"window": "the sliding windows", "tail": "the compressors' tails", "state": "the recurrent states"}
        return " and ".join(
            dict.fromkeys(
                kinds[state.part.component]
                for state in self._fixed()
                if not state.can_resume_at(sequence, length, mark)
            )
        )

    def release(self) -> None:
        """Remove all tokens and free the pages. Deleting the cache does this, too."""
        self._table.release()
        self.high_water_marks = [0] * self.batch_size
        for state in self._fixed():
            for sequence in range(self.batch_size):
                state.truncate(sequence, 0)

    def fork(self, sequences: Sequence[int] | None = None) -> Cache:
        """Return an independent copy of all sequences, or of some in the order given. Pages are shared until either
        cache writes to them."""
        sequences = range(self.batch_size) if sequences is None else sequences
        copy = self._like(len(sequences))
        self._table.fork_into(copy._table, sequences)
        self._copy_fixed_into(copy, sequences)
        return copy

    @classmethod
    def join(cls, caches: Iterable[Cache]) -> Cache:
        """Move all sequences of ``caches``, which must share a pool, into one cache."""
        caches = list(caches)
        if not caches or len({id(cache) for cache in caches}) < len(caches):
            raise CacheError("join: expected one or more distinct caches")
        first = caches[0]
        for cache in caches:
            if cache.pool is not first.pool or cache.options != first.options:
                raise CacheError("join: the caches differ in their page pool, rewind or predicts_ahead")
        result = first._like(sum(cache.batch_size for cache in caches))
        result.max_tokens = max(cache.max_tokens for cache in caches)
        for joined, parts in zip(result._fixed_tensors(), zip(*(cache._fixed_tensors() for cache in caches))):
            torch.cat(parts, out=joined)
        result.high_water_marks = [mark for cache in caches for mark in cache.high_water_marks]
        result._table.adopt([(cache._table, i) for cache in caches for i in range(cache.batch_size)])
        for cache in caches:
            cache.high_water_marks = [0] * cache.batch_size
        return result

    def split(self) -> list[Cache]:
        """Move each sequence into a cache of its own. Return the caches in order."""
        return [self.take([sequence]) for sequence in range(self.batch_size)]

    def take(self, sequences: Sequence[int]) -> Cache:
        """Move some sequences into a new cache, in the order given. They are left empty here."""
        taken = self._like(len(sequences))
        self._copy_fixed_into(taken, sequences)
        taken._table.adopt([(self._table, sequence) for sequence in sequences])
        for sequence in sequences:
            self.high_water_marks[sequence] = 0
        return taken

    def _copy_fixed_into(self, other: Cache, sequences: Sequence[int]) -> None:
        """Copy the fixed state of ``sequences`` to all sequences of ``other``."""
        other.high_water_marks = [self.high_water_marks[sequence] for sequence in sequences]
        rows = torch.tensor(list(sequences))
        for ours, theirs in zip(self._fixed_tensors(), other._fixed_tensors()):
            torch.index_select(ours, 0, rows.to(ours.device), out=theirs)

    def _like(self, batch_size: int) -> Cache:
        """Return an empty cache without pages, with the configuration, pool and rewind of this one."""
        return Cache(self.config, batch_size, self.max_tokens, pool=self.pool, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """``rewind`` and ``predicts_ahead``, which must be equal in caches that are joined."""
        return {"rewind": self.rewind, "predicts_ahead": self.ahead is not None}

    def _fixed(self) -> list[FixedState]:
        return [state for layer in self.all_layers for state in layer.fixed()]

    def _fixed_tensors(self) -> list[Tensor]:
        return [tensor for state in self._fixed() for tensor in state.tensors().values()]
