"""Asynchronous engine that decodes many completions in one process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import torch

from model import checkpoint as checkpoints
from model.cache import Cache
from model.forward.execution import Execution
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer
from serve.engine.config import EngineConfig
from serve.engine.errors import EngineError, QueueFullError, RequestError, RequestFields
from serve.engine.memory import CacheMemory
from serve.engine.sampling_params import SamplingParams
from serve.engine.scheduler import Results, Scheduler
from serve.engine.sequence import Delta, Sequence
from serve.engine.stats import EngineStats
from serve.engine.stream import Stream
from serve.engine.worker import Worker


class Engine:
    """Decode completions with ``model`` (in eval mode), each from a packed cache of its own.

    ``model`` is used as it is; :meth:`from_checkpoint` applies ``config.execution`` and ``config.weights``.

    All methods must be called from one event loop. The model runs in a thread of its own
    (:class:`serve.engine.worker.Worker`), which leaves the loop free. The scheduler belongs to that thread; the loop
    only reads gauges and totals, and aborts sequences.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: EngineConfig | None = None):
        self.config = config or EngineConfig()
        self.model_config = model.config
        self.tokenizer = tokenizer
        self.vocab_size = min(model.config.vocab_size, tokenizer.vocab_size)
        """Number of token IDs. Further rows of the embedding are padding."""
        self._scheduler = Scheduler(model, self.config, self.vocab_size)
        self._worker = Worker(self._scheduler, self._deliver, self._fail)
        self.observer: Callable[[Sequence, Delta], None] | None = None
        """Called on the event loop with every output, before it is delivered."""
        self._streams: dict[int, Stream] = {}
        """Keyed by the ``id`` of each unfinished sequence."""
        self._loop: asyncio.AbstractEventLoop | None = None
        """Event loop of the unfinished streams."""
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

    def submit(
        self, requests: list[tuple[list[int], SamplingParams]], fields: list[RequestFields] | None = None
    ) -> Stream:
        """Submit completions of (prompt token IDs, parameters), all or none. An empty prompt starts from BOS.

        Raises RequestError for a request that can never run, QueueFullError if the queue is full, and EngineError if
        the engine has stopped. ``fields`` names the fields of each completion in a RequestError.
        """
        self.check_health()
        self.check_size(len(requests))
        self._forget_other_loop()
        requests = [(prompt or [self.tokenizer.bos_id], params) for prompt, params in requests]
        for (prompt, params), names in zip(requests, fields or [RequestFields()] * len(requests), strict=True):
            self._validate(prompt, params, names)
        if self.unfinished + len(requests) > self._capacity:
            raise QueueFullError(
                f"the server is busy with {self.unfinished} of at most {self._capacity} completions "
                "(max_active_requests + max_waiting_requests)"
            )
        deadline = time.monotonic() + self.config.request_timeout_seconds
        sequences = [Sequence(prompt, params, self.tokenizer, deadline) for prompt, params in requests]
        stream = Stream(sequences, self._scheduler.abort)
        for sequence in sequences:
            self._streams[id(sequence)] = stream
        self._worker.submit(sequences)
        return stream

    def _forget_other_loop(self) -> None:
        """Abort the requests of an event loop that has ended."""
        if (loop := asyncio.get_running_loop()) is not self._loop:
            for stream in self._streams.values():
                stream.abort()
            self._streams, self._loop = {}, loop

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
        """Abort all requests and end the worker thread."""
        self._stopped = True
        for stream in list(self._streams.values()):
            stream.abort()
        await self._worker.stop()

    def _validate(self, prompt: list[int], params: SamplingParams, fields: RequestFields) -> None:
        vocab_size, context = self.vocab_size, self.model_config.max_positions
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < vocab_size:
                problem = f"token ID {token} is out of range for a vocabulary of {vocab_size}"
                raise RequestError.about(f"{fields.prompt}.{prompt.index(token)}", problem)
        too_long, space = "context_length_exceeded", f"the model's context of {context} tokens"
        total, limit = len(prompt) + params.max_tokens, fields.max_tokens
        if limit is not None and params.max_tokens >= context:
            raise RequestError.about(limit, f"{params.max_tokens} leaves no room for a prompt in {space}", too_long)
        if total > context:
            problem = (
                f"{len(prompt)} tokens leave no room for a completion in {space}"
                if limit is None
                else f"{len(prompt)} tokens plus {limit} {params.max_tokens} is {total}, more than {space}"
            )
            raise RequestError.about(fields.prompt, problem, too_long)
        pages, most = self.memory.pages_for(total), self.memory.pool.pages
        if pages > most:
            problem = f"{total} tokens need {pages} cache pages, but the server has {most} (cache_mebibytes)"
            field = fields.prompt
            if limit is not None and self.memory.pages_for(params.max_tokens) > most:
                field = limit
            raise RequestError.about(field, problem, too_long)

    def name_model(self, name: str) -> None:
        """Use ``name`` in errors and logs."""
        self._scheduler.model_label = f"model '{name}'"

    def _deliver(self, results: Results) -> None:
        """Pass on the output of a step. The worker calls this on the event loop."""
        for sequence, delta in results:
            stream = self._streams.get(id(sequence))
            if stream is None:  # its event loop has ended
                continue
            if self.observer is not None:
                self.observer(sequence, delta)
            if delta.visible:
                stream.put(sequence, delta)
            if delta.final:
                del self._streams[id(sequence)]
            if delta.error is not None:
                stream.abort()  # one failed completion fails its request

    def _fail(self, failure: Exception) -> None:
        """End all requests with an error and accept no further ones. The worker calls this on the event loop."""
        self._failure = failure
        error = EngineError(f"{self._scheduler.model_label}: the engine failed ({type(failure).__name__})")
        delta, streams = Delta(error=error), set(self._streams.values())
        unfinished = [(stream, one) for stream in streams for one in stream.sequences if id(one) in self._streams]
        self._streams.clear()
        for stream, sequence in unfinished:
            stream.put(sequence, delta)
        if self.observer is not None:  # last, since the observer itself may have failed
            for _, sequence in unfinished:
                self.observer(sequence, delta)
