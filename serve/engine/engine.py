"""Asynchronous engine that decodes many completions in one process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from model import checkpoint as checkpoints
from model.cache import Cache
from model.errors import FiftyfoldError
from model.forward.execution import Execution
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer
from serve.engine.config import EngineConfig
from serve.engine.errors import EngineError, QueueFullError, RequestAbortedError, RequestError
from serve.engine.memory import CacheMemory
from serve.engine.sampling_params import SamplingParams
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Delta, Sequence
from serve.engine.stats import EngineStats

logger = logging.getLogger(__name__)


class Stream:
    """Asynchronous iterator over the output of one request: pairs of a completion's index and a :class:`Delta`.

    Iteration ends after the final delta of every completion and raises the first error of any completion.
    """

    def __init__(self, sequences: list[Sequence]):
        self.sequences = sequences
        self._index = {id(sequence): index for index, sequence in enumerate(sequences)}
        self._unfinished = len(sequences)
        self._deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()

    def put(self, sequence: Sequence, delta: Delta) -> None:
        """Append a delta. The engine calls this on the event loop."""
        self._deltas.put_nowait((self._index[id(sequence)], delta))

    def abort(self) -> None:
        """Abort the request. Its caches are freed after the current step. No-op for a finished request."""
        for sequence in self.sequences:
            sequence.aborted = True

    def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        if not self._unfinished:
            raise StopAsyncIteration
        index, delta = await self._deltas.get()
        if delta.error is not None:
            self._unfinished = 0
            raise delta.error
        if delta.final:
            self._unfinished -= 1
        return index, delta


class Engine:
    """Decode completions with ``model`` (in eval mode), each from a packed cache of its own.

    ``model`` is used as it is; :meth:`from_checkpoint` applies ``config.execution`` and ``config.weights``.

    All methods must be called from one event loop. The model runs in a single worker thread, which leaves the loop
    free. The scheduler belongs to the worker during a step and to the loop between steps.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: EngineConfig | None = None):
        self.config = config or EngineConfig()
        self.model_config = model.config
        self.tokenizer = tokenizer
        self._scheduler = Scheduler(model, self.config)
        self._arrivals: list[Sequence] = []
        self.observer: Callable[[Sequence, Delta], None] | None = None
        """Called on the event loop with every output, before it is delivered."""
        self._streams: dict[int, Stream] = {}
        """Keyed by the ``id`` of each unfinished sequence."""
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fiftyfold-engine")
        self._task: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._stopped = False

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, config: EngineConfig | None = None, device: torch.device | str = "cpu"
    ) -> Engine:
        """Return an engine for the model and tokenizer of a checkpoint folder.

        ``config.weights`` of the engine is the data type in use, never ``auto``. Raises CheckpointError for a damaged
        folder and ConfigError for a tokenizer that is missing or does not fit the model.
        """
        config = (config or EngineConfig()).resolve_weights(device)
        model = checkpoints.load(folder, device=device)
        model.execution = Execution(config.execution)
        model.cast_weights(getattr(torch, config.weights))
        return cls(model, load_tokenizer(folder, model_vocab_size=model.config.vocab_size), config)

    @property
    def unfinished(self) -> int:
        """Number of completions that are running or waiting."""
        return len(self._streams)

    @property
    def running(self) -> list[Sequence]:
        """Completions that hold a cache."""
        return [*self._scheduler.prefilling, *self._scheduler.batch.sequences]

    @property
    def decoding(self) -> int:
        """Number of completions that are decoded together."""
        return len(self._scheduler.batch)

    @property
    def max_sequence_tokens(self) -> int:
        """Most tokens of prompt and completion together, by the model's context and the pages of the server."""
        memory, context = self.memory, self.model_config.max_positions
        return min(context, memory.pool.pages * memory.pool.page_tokens) if memory.pool.parts else context

    @property
    def stats(self) -> EngineStats:
        return self._scheduler.stats

    @property
    def memory(self) -> CacheMemory:
        return self._scheduler.memory

    def cache_bytes_per_token(self) -> float:
        """Return the cache bytes per token of a full context, summed over the storages (on the meta device)."""
        return Cache(self.model_config, 1, self.model_config.max_positions, device="meta").bytes_per_token()

    def submit(self, requests: list[tuple[list[int], SamplingParams]]) -> Stream:
        """Submit completions of (prompt token IDs, parameters), all or none. An empty prompt starts from BOS.

        Raises RequestError for a request that can never run, QueueFullError if the queue is full, and EngineError if
        the engine has stopped.
        """
        self.check_health()
        self.check_size(len(requests))
        requests = [(prompt or [self.tokenizer.bos_id], params) for prompt, params in requests]
        for prompt, params in requests:
            self._validate(prompt, params)
        if self.unfinished + len(requests) > self._capacity:
            raise QueueFullError(
                f"the server is busy with {self.unfinished} of at most {self._capacity} completions "
                "(max_active_requests + max_waiting_requests)"
            )
        deadline = time.monotonic() + self.config.request_timeout_seconds
        stream = Stream([Sequence(prompt, params, self.tokenizer, deadline) for prompt, params in requests])
        for sequence in stream.sequences:
            self._streams[id(sequence)] = stream
        self._arrivals += stream.sequences
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        return stream

    @property
    def _capacity(self) -> int:
        return self.config.max_active_requests + self.config.max_waiting_requests

    def check_size(self, completions: int) -> None:
        """Raise RequestError for a request of more completions than the engine ever accepts."""
        if completions > self._capacity:
            raise RequestError(
                f"the request asks for {completions} completions, but the server accepts at most {self._capacity} "
                "(max_active_requests + max_waiting_requests)"
            )

    def check_health(self) -> None:
        """Raise EngineError if the engine has failed or stopped."""
        if self._failure is not None:
            raise EngineError(f"the engine failed ({type(self._failure).__name__}: {self._failure})")
        if self._stopped:
            raise EngineError("the server is shutting down")

    async def stop(self) -> None:
        """Abort all requests and shut down the worker thread."""
        self._stopped = True
        for stream in list(self._streams.values()):
            stream.abort()
        if self._task is not None:
            await self._task
        self._worker.shutdown()

    def _validate(self, prompt: list[int], params: SamplingParams) -> None:
        vocab_size, context = self.model_config.vocab_size, self.model_config.max_positions
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"prompt: token ID {token} is out of range for a vocabulary of {vocab_size}", param="prompt"
                )
        total = len(prompt) + params.max_tokens
        if total > context:
            raise RequestError(
                f"prompt: {len(prompt)} tokens plus max_tokens {params.max_tokens} is {total}, more than the model's "
                f"context of {context} tokens",
                param="prompt",
                code="context_length_exceeded",
            )
        pages, most = self.memory.pages_for(total), self.memory.pool.pages
        if pages > most:
            raise RequestError(
                f"prompt: {total} tokens need {pages} cache pages, but the server has {most} (cache_mebibytes)",
                param="prompt",
                code="context_length_exceeded",
            )

    async def _run(self) -> None:
        """Step until no sequence is left."""
        loop = asyncio.get_running_loop()
        try:
            while self._arrivals or self._scheduler.has_unfinished:
                arrivals, self._arrivals = self._arrivals, []
                self._deliver(await loop.run_in_executor(self._worker, self._scheduler.step, arrivals))
        except Exception as error:
            logger.exception("the engine failed")
            self._failure = error
            self._fail_all(EngineError(f"the engine failed ({type(error).__name__})"))
        except asyncio.CancelledError:
            self._stopped = True
            self._fail_all(RequestAbortedError("the server is shutting down"))
            raise

    def _deliver(self, results: list[tuple[Sequence, Delta]]) -> None:
        for sequence, delta in results:
            if self.observer is not None:
                self.observer(sequence, delta)
            if delta == Delta():  # an unfinished prefill, or text held back
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
                    if self.observer is not None:
                        self.observer(sequence, Delta(error=error))
                    stream.put(sequence, Delta(error=error))
        self._streams.clear()
