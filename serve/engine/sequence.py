"""One completion under way: a prompt, its cache, and the text it has produced."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from model.cache import Cache
from model.errors import FiftyfoldError
from model.tokenizer import Tokenizer
from serve.engine.detokenizer import Detokenizer, StopStrings
from serve.engine.sampler import TokenLogprob, sample, token_logprobs

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. The values are trusted: the HTTP schema checks them."""

    max_tokens: int = 16
    """Tokens to produce at most; 0 only reads the prompt."""
    temperature: float = 1.0
    """0 takes the most likely token each time."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    seed: int | None = None
    """The same seed gives the same text, whatever else the server is doing; None draws afresh each time."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    logprobs: int | None = None
    """How many alternatives to report per token; None reports nothing, 0 the chosen token alone."""
    prompt_logprobs: bool = False
    """Report the prompt's tokens too."""


@dataclass(frozen=True)
class Delta:
    """What one engine step added to a completion."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    """``stop``: end-of-sequence token or stop string. ``length``: max_tokens. None: more follows."""
    error: FiftyfoldError | None = None
    """The completion ended without a result."""

    @property
    def final(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Sequence:
    """State of one completion. Only the engine's worker thread advances it."""

    def __init__(self, prompt: Tokens[int], params: SamplingParams, tokenizer: Tokenizer, deadline: float):
        self.prompt = list(prompt)
        self.params = params
        self.deadline = deadline
        """On the clock of :func:`time.monotonic`, seconds."""
        self.aborted = False
        """Set from any thread; the worker drops the sequence, and with it the cache, when it next sees it."""
        self.cache: Cache | None = None
        self.cache_nbytes = 0
        """Bytes of this sequence's cache, kept after the cache itself is gone."""
        self.prefilled = 0
        """Tokens of the prompt that the cache holds."""
        self.prompt_logprobs: list[TokenLogprob] = []
        self.completion_tokens = 0
        self.last_token = -1
        self._eos_id = tokenizer.eos_id
        self._prompt_text = Detokenizer(tokenizer)
        self._prompt_offset = 0
        self._text = Detokenizer(tokenizer, context=self.prompt)
        self._stop = StopStrings(params.stop)
        self._offset = 0
        self._emitted = 0
        self._unsent: list[TokenLogprob] = []
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def cache_tokens(self) -> int:
        """Tokens the cache must have room for. The last token produced is never fed back."""
        return len(self.prompt) + max(0, self.params.max_tokens - 1)

    @property
    def prefill_done(self) -> bool:
        return self.prefilled == len(self.prompt)

    def note_prompt(self, logits: Tensor) -> None:
        """Note what logits [n, vocab] of n prompt tokens say of the tokens after them. They come in order."""
        start = max(0, len(self.prompt_logprobs) - 1)
        following = self.prompt[start + 1 : start + 1 + logits.shape[0]]
        records = token_logprobs(logits[: len(following)], following, self.params.logprobs or 0)
        if not self.prompt_logprobs:
            records.insert(0, TokenLogprob(self.prompt[0], None))
        for record in records:
            self.prompt_logprobs.append(replace(record, offset=self._prompt_offset))
            self._prompt_offset += len(self._prompt_text.push(record.token_id))

    def advance(self, logits: Tensor) -> Delta:
        """Choose the next token from logits [vocab] and say what it adds."""
        p = self.params
        if p.max_tokens == 0:
            return Delta(finish_reason="length")
        token = sample(logits, p.temperature, p.top_p, p.top_k, self._generator)
        self.last_token = token
        self.completion_tokens += 1
        if p.logprobs is not None:
            [record] = token_logprobs(logits[None], [token], p.logprobs)
            self._unsent.append(replace(record, offset=self._offset))
        if token == self._eos_id:
            return self._finish("", "stop")
        piece = self._text.push(token)
        self._offset += len(piece)
        text, stopped = self._stop.push(piece)
        if stopped:
            return self._cut(text)
        if self.completion_tokens == p.max_tokens:
            return self._finish(text, "length")
        self._emitted += len(text)
        return Delta(text, self._take_logprobs())

    def _finish(self, text: str, reason: FinishReason) -> Delta:
        """End with everything that was held back, unless that completes a stop string."""
        more, stopped = self._stop.push(self._text.flush())
        if stopped:
            return self._cut(text + more)
        logprobs, self._unsent = tuple(self._unsent), []
        return Delta(text + more + self._stop.flush(), logprobs, reason)

    def _cut(self, text: str) -> Delta:
        """End before a stop string; tokens that belong to it are not reported."""
        self._emitted += len(text)
        return Delta(text, self._take_logprobs(), "stop")

    def _take_logprobs(self) -> tuple[TokenLogprob, ...]:
        """The tokens whose text has begun to be sent."""
        ready = [record for record in self._unsent if record.offset < self._emitted]
        self._unsent = self._unsent[len(ready) :]
        return tuple(ready)
