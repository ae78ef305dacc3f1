"""Step-by-step scheduling of sequences."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

import torch

from model.cache import Cache
from model.errors import FiftyfoldError
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from serve.engine.config import EngineConfig
from serve.engine.errors import EngineError, RequestAbortedError, RequestTimeoutError
from serve.engine.sequence import Delta, Sequence

logger = logging.getLogger(__name__)


class Scheduler:
    """Advance sequences step by step, in order of arrival. Not thread-safe.

    A step prefills one chunk of one prompt and decodes one token of every prefilled sequence, so that a long prompt
    delays running streams by at most one chunk per step. Each sequence runs through the model separately, in chunks
    that depend on that sequence alone, so its tokens do not depend on concurrent requests.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: EngineConfig):
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.device = next(model.parameters()).device
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    @torch.inference_mode()
    def step(self, arrivals: Iterable[Sequence] = ()) -> list[tuple[Sequence, Delta]]:
        """Admit ``arrivals``, run one step, and return its output per sequence."""
        self.waiting.extend(arrivals)
        results = self._drop_aborted_and_expired()
        while self.waiting and len(self.running) < self.config.max_active_requests:
            self.running.append(self.waiting.popleft())
        decoding = [sequence for sequence in self.running if sequence.prefill_done]
        prefilling = next((sequence for sequence in self.running if not sequence.prefill_done), None)
        if prefilling is not None:
            results.append((prefilling, self._run_guarded(self._prefill, prefilling)))
        results += [(sequence, self._run_guarded(self._decode, sequence)) for sequence in decoding]
        for sequence, delta in results:
            if delta.final:
                sequence.cache = None
                if sequence in self.running:
                    self.running.remove(sequence)
        return results

    def _prefill(self, sequence: Sequence) -> Delta:
        if sequence.cache is None:
            sequence.cache = Cache(self.model.config, 1, sequence.max_cached_tokens, self.device)
            sequence.cache_nbytes = sequence.cache.nbytes()
        chunk = sequence.prompt[sequence.prefilled : sequence.prefilled + self.config.prefill_chunk]
        # The output head runs over the whole chunk only if the prompt's log-probabilities were requested.
        prompt_logprobs = sequence.params.prompt_logprobs
        logits = self.model(self._input_ids(chunk), sequence.cache, last_only=not prompt_logprobs)[0]
        sequence.prefilled += len(chunk)
        if prompt_logprobs:
            sequence.add_prompt_logprobs(logits)
        return sequence.advance(logits[-1]) if sequence.prefill_done else Delta()

    def _decode(self, sequence: Sequence) -> Delta:
        input_ids = self._input_ids([sequence.last_token])
        return sequence.advance(self.model(input_ids, sequence.cache, last_only=True)[0, -1])

    def _input_ids(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor([tokens], dtype=torch.int64, device=self.device)

    def _run_guarded(self, run: Callable[[Sequence], Delta], sequence: Sequence) -> Delta:
        """Run ``run(sequence)``. An exception ends this sequence alone."""
        try:
            return run(sequence)
        except Exception as error:
            logger.exception("the model failed on a request")
            return Delta(error=EngineError(f"the model failed on this request ({type(error).__name__})"))

    def _drop_aborted_and_expired(self) -> list[tuple[Sequence, Delta]]:
        now = time.monotonic()
        dropped = [s for s in (*self.running, *self.waiting) if s.aborted or now > s.deadline]
        if not dropped:
            return []
        dropped_ids = {id(sequence) for sequence in dropped}
        self.running = [sequence for sequence in self.running if id(sequence) not in dropped_ids]
        self.waiting = deque(sequence for sequence in self.waiting if id(sequence) not in dropped_ids)
        return [(sequence, Delta(error=self._reason(sequence))) for sequence in dropped]

    def _reason(self, sequence: Sequence) -> FiftyfoldError:
        if sequence.aborted:
            return RequestAbortedError("the request was aborted")
        seconds = self.config.request_timeout_seconds
        return RequestTimeoutError(f"the request did not finish within {seconds:g} seconds (request_timeout_seconds)")
