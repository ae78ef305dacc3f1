"""Which sequence does what in one engine step."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from model.cache import Cache
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from serve.engine.errors import EngineError, RequestAbortedError, RequestTimeoutError
from serve.engine.sequence import Delta, Sequence

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one engine takes on."""

    max_active: int = 16
    """Sequences that hold a cache and are worked on."""
    max_waiting: int = 64
    """Further ones that may wait."""
    prefill_chunk: int = 512
    """Prompt tokens read in one step."""
    timeout_seconds: float = 120.0
    """From submission to the last token, waiting included."""


class Scheduler:
    """Advances sequences one step at a time, in order of arrival. Not thread-safe: one thread calls it.

    A step reads one chunk of one prompt and decodes one token of every sequence whose prompt has been read, so that a
    long prompt delays running streams by one chunk at most. Each sequence runs through the model alone, in pieces that
    depend on nothing but itself: its tokens do not depend on its company.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, limits: Limits):
        self.model = model
        self.tokenizer = tokenizer
        self.limits = limits
        self.device = next(model.parameters()).device
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []

    @property
    def busy(self) -> bool:
        return bool(self.active or self.waiting)

    @torch.inference_mode()
    def step(self, arrivals: Iterable[Sequence] = ()) -> list[tuple[Sequence, Delta]]:
        """Take ``arrivals`` in, do one step, and return what it added to which sequence."""
        self.waiting.extend(arrivals)
        results = self._drop_given_up()
        while self.waiting and len(self.active) < self.limits.max_active:
            self.active.append(self.waiting.popleft())
        decoding = [sequence for sequence in self.active if sequence.prefill_done]
        reading = next((sequence for sequence in self.active if not sequence.prefill_done), None)
        if reading is not None:
            results.append((reading, self._guarded(self._prefill, reading)))
        results += [(sequence, self._guarded(self._decode, sequence)) for sequence in decoding]
        for sequence, delta in results:
            if delta.final:
                sequence.cache = None
                if sequence in self.active:
                    self.active.remove(sequence)
        return results

    def _prefill(self, sequence: Sequence) -> Delta:
        if sequence.cache is None:
            sequence.cache = Cache(self.model.config, 1, sequence.cache_tokens, self.device)
            sequence.cache_nbytes = sequence.cache.nbytes()
        chunk = sequence.prompt[sequence.prefilled : sequence.prefilled + self.limits.prefill_chunk]
        # The head over a whole chunk is only worth its time where the prompt's log-probabilities were asked for.
        every = sequence.params.prompt_logprobs
        logits = self.model(self._ids(chunk), sequence.cache, last_only=not every)[0]
        sequence.prefilled += len(chunk)
        if every:
            sequence.note_prompt(logits)
        return sequence.advance(logits[-1]) if sequence.prefill_done else Delta()

    def _decode(self, sequence: Sequence) -> Delta:
        return sequence.advance(self.model(self._ids([sequence.last_token]), sequence.cache, last_only=True)[0, -1])

    def _ids(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor([tokens], dtype=torch.int64, device=self.device)

    def _guarded(self, work: Callable[[Sequence], Delta], sequence: Sequence) -> Delta:
        """An exception ends this sequence alone."""
        try:
            return work(sequence)
        except Exception as error:
            logger.exception("a request failed inside the model")
            return Delta(error=EngineError(f"the request failed inside the model ({type(error).__name__})"))

    def _drop_given_up(self) -> list[tuple[Sequence, Delta]]:
        now = time.monotonic()
        dropped: list[tuple[Sequence, Delta]] = []
        for sequence in [*self.active, *self.waiting]:
            if sequence.aborted:
                dropped.append((sequence, Delta(error=RequestAbortedError("the request was aborted"))))
            elif now > sequence.deadline:
                message = f"the request was not finished within {self.limits.timeout_seconds:g} seconds"
                dropped.append((sequence, Delta(error=RequestTimeoutError(message))))
        gone = {id(sequence) for sequence, _ in dropped}
        self.active = [sequence for sequence in self.active if id(sequence) not in gone]
        self.waiting = deque(sequence for sequence in self.waiting if id(sequence) not in gone)
        return dropped
