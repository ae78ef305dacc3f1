"""State of one completion: its prompt, its cache, and the text produced so far."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from model.cache import Cache
from model.errors import FiftyfoldError
from model.tokenizer import Tokenizer
from model.tokenizer.stop_strings import StopStrings
from serve.engine.detokenizer import Detokenizer, StopStringFilter
from serve.engine.sampler import TokenLogprob, sample, token_logprobs

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one completion. The HTTP schema validates the values."""

    max_tokens: int = 16
    """Maximum number of tokens to generate; 0 only prefills the prompt."""
    temperature: float = 1.0
    """0 selects the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    seed: int | None = None
    """A seed makes the text reproducible, regardless of concurrent requests; None uses a random seed."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings. A string may spell special tokens."""
    logprobs: int | None = None
    """Number of alternatives to report per token; 0 reports the sampled token alone, None reports nothing."""
    prompt_logprobs: bool = False
    """Report the prompt's tokens as well."""


@dataclass(frozen=True)
class Delta:
    """Output that one engine step added to a completion."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    """``stop``: token that ends generation, or stop string. ``length``: max_tokens reached. None: not finished."""
    error: FiftyfoldError | None = None
    """Reason why the completion failed, if it did."""

    @property
    def final(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Sequence:
    """State of one completion. Only the engine's worker thread advances it."""

    def __init__(self, prompt: Tokens[int], params: SamplingParams, tokenizer: Tokenizer, deadline: float):
        self.prompt = list(prompt)
        self.params = params
        self.deadline = deadline
        """Seconds on the clock of :func:`time.monotonic`."""
        self.aborted = False
        """May be set from any thread; the worker then drops the sequence and its cache in the next step."""
        self.cache: Cache | None = None
        self.cache_nbytes = 0
        """Bytes of the cache, kept after the cache is freed."""
        self.prefilled = 0
        """Prompt tokens in the cache."""
        self.prompt_logprobs: list[TokenLogprob] = []
        self.completion_tokens = 0
        self.last_token = -1
        self._stop_ids = tokenizer.stop_ids
        self._prompt_detokenizer = Detokenizer(tokenizer)
        self._prompt_chars = 0
        self._detokenizer = Detokenizer(tokenizer, context=self.prompt)
        self._stop_strings = StopStrings(params.stop, tokenizer)
        self._stop_filter = StopStringFilter(self._stop_strings.patterns)
        self._decoded_chars = 0
        self._emitted_chars = 0
        self._pending_logprobs: list[TokenLogprob] = []
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that the cache must hold. The last generated token is never fed back."""
        return len(self.prompt) + max(0, self.params.max_tokens - 1)

    @property
    def prefill_done(self) -> bool:
        return self.prefilled == len(self.prompt)

    def add_prompt_logprobs(self, logits: Tensor) -> None:
        """Record the log-probabilities of the tokens that follow the next n prompt tokens, given logits [n, vocab]."""
        start = max(0, len(self.prompt_logprobs) - 1)
        following = self.prompt[start + 1 : start + 1 + logits.shape[0]]
        records = token_logprobs(logits[: len(following)], following, self.params.logprobs or 0)
        if not self.prompt_logprobs:
            records.insert(0, TokenLogprob(self.prompt[0], None))
        for record in records:
            self.prompt_logprobs.append(replace(record, text_offset=self._prompt_chars))
            self._prompt_chars += len(self._prompt_detokenizer.push(record.token_id))

    def advance(self, logits: Tensor) -> Delta:
        """Sample the next token from logits [vocab] and return its output."""
        p = self.params
        if p.max_tokens == 0:
            return self._finish("", "length")
        token = sample(logits, p.temperature, p.top_p, p.top_k, self._generator)
        self.last_token = token
        self.completion_tokens += 1
        if p.logprobs is not None:
            [record] = token_logprobs(logits[None], [token], p.logprobs)
            self._pending_logprobs.append(replace(record, text_offset=self._decoded_chars))
        if token in self._stop_ids:
            return self._finish("", "stop")
        piece = self._detokenizer.push(token)
        self._decoded_chars += len(piece)
        text, stopped = self._stop_filter.push(piece or self._stop_strings.mark(token))
        if stopped:
            return self._stop(text)
        if self.completion_tokens == p.max_tokens:
            return self._finish(text, "length")
        self._emitted_chars += len(text)
        return Delta(text, self._pop_logprobs())

    def _finish(self, text: str, reason: FinishReason) -> Delta:
        """Finish and emit the text held back so far, unless it completes a stop string."""
        more, stopped = self._stop_filter.push(self._detokenizer.flush())
        if stopped:
            return self._stop(text + more)
        logprobs, self._pending_logprobs = tuple(self._pending_logprobs), []
        return Delta(text + more + self._stop_filter.flush(), logprobs, reason)

    def _stop(self, text: str) -> Delta:
        """End before a stop string. Tokens of the stop string are not reported."""
        self._emitted_chars += len(text)
        return Delta(text, self._pop_logprobs(), "stop")

    def _pop_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Remove and return the log-probabilities of tokens whose text has been emitted, at least in part."""
        ready = [record for record in self._pending_logprobs if record.text_offset < self._emitted_chars]
        self._pending_logprobs = self._pending_logprobs[len(ready) :]
        return tuple(ready)
