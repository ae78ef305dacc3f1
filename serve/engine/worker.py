"""Thread that advances a scheduler beside an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from serve.engine.scheduler import Results, Scheduler
from serve.engine.sequence import Sequence

logger = logging.getLogger(__name__)

MAX_STEPS_AHEAD = 4
"""Steps whose results the event loop may not have taken yet. Then the thread waits, which leaves the interpreter to the
loop on a busy machine."""
_POLL_SECONDS = 1.0
"""Interval of the checks for an event loop that has been closed or stopped while waiting for it."""


class Worker:
    """Steps ``scheduler`` in a thread of its own while there is work, and calls ``deliver`` on the event loop.

    The thread does not wait for the loop between steps: it takes new sequences itself, and wakes the loop once for the
    results of all steps since the loop last looked. Without work the thread sleeps. It aborts all sequences if the loop
    is closed, or stopped for a second while the thread waits for it. If a step or a delivery raises, ``fail`` is called
    on the loop with the exception, and again for later submissions. No further step is run.
    """

    def __init__(
        self, scheduler: Scheduler, deliver: Callable[[Results], None], fail: Callable[[Exception], None]
    ) -> None:
        self._scheduler, self._deliver, self._fail = scheduler, deliver, fail
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fiftyfold-engine")
        """Runs one job per busy period. It ends its thread when it is garbage-collected."""
        self._changed = threading.Condition()
        """Guards the fields below."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrivals: list[Sequence] = []
        self._undelivered: list[Results] = []
        self._job: Future[None] | None = None
        self._busy = False
        self._failure: Exception | None = None

    def submit(self, sequences: list[Sequence]) -> None:
        """Add sequences, on the event loop that takes their results."""
        loop = asyncio.get_running_loop()
        with self._changed:
            if loop is not self._loop:  # results for another loop, which has been closed, were never taken
                self._loop, self._undelivered = loop, []
                self._changed.notify()
            self._arrivals += sequences
            if not self._busy and self._failure is None:
                try:
                    self._job = self.executor.submit(self._run)
                    self._busy = True
                except RuntimeError as error:  # no thread can be started
                    self._failure = error
            if self._failure is not None:
                loop.call_soon(self._fail, self._failure)

    async def stop(self) -> None:
        """Wait for the end of all work and end the thread."""
        if self._job is not None:
            await asyncio.wrap_future(self._job)
        self.executor.shutdown()

    # --- on the thread

    def _run(self) -> None:
        try:
            while (arrivals := self._next()) is not None:
                if results := self._scheduler.step(arrivals):
                    self._hand_over(results)
        except Exception as error:
            logger.exception("the engine failed")
            with self._changed:
                self._busy, self._failure, loop = False, error, self._loop
            assert loop is not None
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._fail, error)

    def _next(self) -> list[Sequence] | None:
        """Return the new sequences, or None if there is no work left."""
        with self._changed:
            arrivals, self._arrivals = self._arrivals, []
            if self._failure is None and (arrivals or self._scheduler.has_unfinished):
                return arrivals
            self._busy = False
            return None

    def _hand_over(self, results: Results) -> None:
        """Pass the results of a step to the loop. Wait for a loop that is too far behind."""
        with self._changed:
            loop = self._loop
            assert loop is not None
            self._undelivered.append(results)
            if len(self._undelivered) == 1:
                try:
                    loop.call_soon_threadsafe(self._take)
                except RuntimeError:
                    if not loop.is_closed():
                        raise
            ended = loop.is_closed()
            while len(self._undelivered) > MAX_STEPS_AHEAD and not ended:
                ended = not self._changed.wait(_POLL_SECONDS) and not loop.is_running()
            if loop is not self._loop or not ended:
                return
            if loop.is_closed():
                self._undelivered = []
        self._scheduler.abort_all()  # no reader is left, or each finds its request aborted if a stopped loop runs again

    # --- on the event loop

    def _take(self) -> None:
        with self._changed:
            steps, self._undelivered = self._undelivered, []
            self._changed.notify()
        try:
            for results in steps:
                self._deliver(results)
        except Exception as error:
            logger.exception("the engine failed")
            with self._changed:
                self._failure = error
            self._deliver = lambda results: None  # a step may be running
            self._fail(error)
