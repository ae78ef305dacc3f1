"""Output of one request on its way from the engine to a reader."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field

from serve.engine.sequence import Delta, Sequence

BATCHES_PER_SECOND = 200
"""Batches of output of all streams together, as long as none waits longer than :data:`LONGEST_INTERVAL`. Each takes
half a millisecond of processor time on its way through the processes of a deployment."""
LONGEST_INTERVAL = 0.2


@dataclass
class Pace:
    """Times between the batches of :meth:`Stream.batches`. Streams with the same object share a rate."""

    interval: float = 0.0
    """Minimum seconds between two batches of a stream's output. Many streams wait longer, so that together they have at
    most :data:`BATCHES_PER_SECOND`. 0 puts every output into a batch of its own."""
    keep_alive: float = math.inf
    """Seconds without output after which an empty batch is yielded."""
    active: int = field(default=0, init=False)
    """Streams that are being read."""

    @property
    def shared_interval(self) -> float:
        """Least seconds between two batches of each stream now."""
        return max(self.interval, min(self.active / BATCHES_PER_SECOND, LONGEST_INTERVAL) if self.interval else 0.0)


class Stream:
    """Asynchronous iterator over the output of one request: pairs of a completion's index and a :class:`Delta`.

    Iteration ends after the final delta of every completion and raises the first error of any completion. One task at
    a time may iterate.
    """

    def __init__(self, sequences: list[Sequence], abort: Callable[[Sequence], None]):
        self.sequences = sequences
        self._abort = abort
        self._index = {id(sequence): index for index, sequence in enumerate(sequences)}
        self._deltas: deque[tuple[int, Delta]] = deque()
        self._unfinished = len(sequences)
        """Completions whose final delta has not been read."""
        self._to_come = len(sequences)
        """Completions whose final delta has not arrived; 0 after an error."""
        self._reader: asyncio.Future[None] | None = None
        self._reader_wants_all = False

    def put(self, sequence: Sequence, delta: Delta) -> None:
        """Append a delta. The engine calls this on the event loop."""
        self._deltas.append((self._index[id(sequence)], delta))
        self._to_come = 0 if delta.error is not None else self._to_come - delta.final
        if self._reader is not None and not (self._reader_wants_all and self._to_come > 0):
            _wake(self._reader)

    def abort(self) -> None:
        """Abort the request. Its caches are freed after the current step. No-op for a finished request."""
        for sequence in self.sequences:
            self._abort(sequence)

    def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        if not self._unfinished:
            raise StopAsyncIteration
        while not self._deltas:
            await self._wait(math.inf)
        return self._take()

    async def batches(self, pace: Pace) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """Yield the same output in batches.

        The first batch comes at once, the last one when the request ends, others at least ``pace.shared_interval``
        apart. An error is raised after the output before it.
        """
        now = asyncio.get_running_loop().time
        next_output, next_keep_alive = 0.0, now() + pace.keep_alive
        pace.active += 1
        try:
            while self._unfinished:
                waits = now() < next_output and self._to_come > 0
                if self._deltas and not waits:
                    batch = [self._take()]
                    while pace.interval and self._deltas and self._deltas[0][1].error is None:
                        batch.append(self._take())
                    yield batch
                    next_output = now() + pace.shared_interval
                elif now() >= next_keep_alive:
                    yield []
                else:
                    await self._wait(min(next_output if waits else math.inf, next_keep_alive), for_all=waits)
                    continue
                next_keep_alive = now() + pace.keep_alive
        finally:
            pace.active -= 1

    def _take(self) -> tuple[int, Delta]:
        index, delta = self._deltas.popleft()
        if delta.error is not None:
            self._unfinished = 0
            raise delta.error
        self._unfinished -= delta.final
        return index, delta

    async def _wait(self, until: float, for_all: bool = False) -> None:
        """Wait for output, or with ``for_all`` for the end of the request. ``until`` is a time of the event loop."""
        loop = asyncio.get_running_loop()
        self._reader, self._reader_wants_all = loop.create_future(), for_all
        timer = loop.call_at(until, _wake, self._reader) if until < math.inf else None
        try:
            await self._reader
        finally:
            self._reader = None
            if timer is not None:
                timer.cancel()


def _wake(reader: asyncio.Future[None]) -> None:
    if not reader.done():
        reader.set_result(None)
