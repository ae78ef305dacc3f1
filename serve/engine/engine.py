"""The engine: many completions at once in one process, offered to asyncio code."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from model.cache import Cache
from model.errors import FiftyfoldError
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from serve.engine.errors import EngineError, QueueFullError, RequestAbortedError, RequestError
from serve.engine.scheduler import Limits, Scheduler
from serve.engine.sequence import Delta, SamplingParams, Sequence

logger = logging.getLogger(__name__)


class Stream:
    """The completions of one request, as they come: an async iterator over (index, :class:`Delta`).

    It ends when every completion has its final delta. Iterating raises the completion's error as soon as one fails.
    """

    def __init__(self, sequences: list[Sequence]):
        self.sequences = sequences
        self._index = {id(sequence): index for index, sequence in enumerate(sequences)}
        self._open = len(sequences)
        self._deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()

    @property
    def finished(self) -> bool:
        """Whether the delta last iterated was the request's last."""
        return not self._open

    def put(self, sequence: Sequence, delta: Delta) -> None:
        """Called by the engine, on the event loop."""
        self._deltas.put_nowait((self._index[id(sequence)], delta))

    def abort(self) -> None:
        """Give the request up: its caches are freed when the step now running ends. Harmless after the end."""
        for sequence in self.sequences:
            sequence.aborted = True

    def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        if not self._open:
            raise StopAsyncIteration
        index, delta = await self._deltas.get()
        if delta.error is not None:
            self._open = 0
            raise delta.error
        if delta.final:
            self._open -= 1
        return index, delta


class Engine:
    """Decodes with ``model`` (in eval mode) from packed caches, one per completion.

    All methods belong to one event loop. The model runs in a single worker thread, so the loop stays free; thread and
    loop hand the scheduler to each other and never hold it together.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, limits: Limits | None = None):
        self.config = model.config
        self.tokenizer = tokenizer
        self.limits = limits or Limits()
        self._scheduler = Scheduler(model, tokenizer, self.limits)
        self._arrivals: list[Sequence] = []
        self._streams: dict[int, Stream] = {}
        """By id of the unfinished sequence."""
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fiftyfold-engine")
        self._task: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._stopped = False

    @property
    def unfinished(self) -> int:
        """Completions that are being worked on or wait."""
        return len(self._streams)

    def cache_bytes_per_token(self) -> float:
        """Cache bytes per token of a full context, counted from the (unallocated) storages it would take."""
        return Cache(self.config, 1, self.config.max_positions, device="meta").bytes_per_token()

    def submit(self, requests: list[tuple[list[int], SamplingParams]]) -> Stream:
        """Start the completions of (prompt token ids, parameters), all or none; an empty prompt starts from BOS.

        Raises RequestError for a request that can never run, QueueFullError where there is no room at present, and
        EngineError when the engine has stopped.
        """
        self.check_health()
        capacity = self.limits.max_active + self.limits.max_waiting
        if len(requests) > capacity:
            raise RequestError(f"the request asks for {len(requests)} completions, the server takes {capacity} at most")
        requests = [(prompt or [self.tokenizer.bos_id], params) for prompt, params in requests]
        for prompt, params in requests:
            self._check(prompt, params)
        if self.unfinished + len(requests) > capacity:
            raise QueueFullError(f"the server is busy with {self.unfinished} of at most {capacity} completions")
        deadline = time.monotonic() + self.limits.timeout_seconds
        stream = Stream([Sequence(prompt, params, self.tokenizer, deadline) for prompt, params in requests])
        for sequence in stream.sequences:
            self._streams[id(sequence)] = stream
        self._arrivals += stream.sequences
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        return stream

    def check_health(self) -> None:
        """Raise EngineError when the engine cannot work any more."""
        if self._failure is not None:
            raise EngineError(f"the engine failed ({type(self._failure).__name__}: {self._failure})")
        if self._stopped:
            raise EngineError("the server is stopping")

    async def stop(self) -> None:
        """Abort what is under way and release the worker thread."""
        self._stopped = True
        for stream in list(self._streams.values()):
            stream.abort()
        if self._task is not None:
            await self._task
        self._worker.shutdown()

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < self.config.vocab_size:
                raise RequestError(
                    f"prompt: token id {token} is not in the vocabulary of {self.config.vocab_size}", param="prompt"
                )
        if len(prompt) + params.max_tokens > self.config.max_positions:
            raise RequestError(
                f"prompt: {len(prompt)} tokens and max_tokens {params.max_tokens} make "
                f"{len(prompt) + params.max_tokens}, the model's context is {self.config.max_positions} tokens",
                param="prompt",
                code="context_length_exceeded",
            )

    async def _run(self) -> None:
        """Step until nothing is left to do."""
        loop = asyncio.get_running_loop()
        try:
            while self._arrivals or self._scheduler.busy:
                arrivals, self._arrivals = self._arrivals, []
                self._deliver(await loop.run_in_executor(self._worker, self._scheduler.step, arrivals))
        except Exception as error:
            logger.exception("the engine failed")
            self._failure = error
            self._fail_all(EngineError(f"the engine failed ({type(error).__name__})"))
        except asyncio.CancelledError:
            self._stopped = True
            self._fail_all(RequestAbortedError("the server is stopping"))
            raise

    def _deliver(self, results: list[tuple[Sequence, Delta]]) -> None:
        for sequence, delta in results:
            if delta == Delta():  # a prompt half read, or text held back
                continue
            stream = self._streams[id(sequence)]
            stream.put(sequence, delta)
            if delta.final:
                del self._streams[id(sequence)]
            if delta.error is not None:
                stream.abort()  # one failed completion fails its request

    def _fail_all(self, error: FiftyfoldError) -> None:
        for key, stream in list(self._streams.items()):
            for sequence in stream.sequences:
                if id(sequence) == key:
                    stream.put(sequence, Delta(error=error))
        self._streams.clear()
