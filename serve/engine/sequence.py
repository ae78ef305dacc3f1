"""State of one completion: its tokens, its cache, and the text produced so far."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from typing import Literal, NamedTuple

from torch import Tensor

from model.cache import Cache
from model.errors import FiftyfoldError
from model.tokenizer import Tokenizer
from model.tokenizer.stop_strings import StopStrings
from model.tokenizer.streaming import Detokenizer, GeneratedText
from serve.engine.logprobs import TokenLogprob, token_logprobs
from serve.engine.sampler import Sampler
from serve.engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]


class Delta(NamedTuple):
    """Output that one engine step added to a completion."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    """``stop``: token that ends generation, or stop string. ``length``: max_tokens reached. None: not finished."""
    error: FiftyfoldError | None = None
    """Reason why the completion failed, if it did."""
    tokens: int = 0
    """Number of tokens that were generated, those whose text is held back included."""

    @property
    def visible(self) -> bool:
        """True if a client should receive this. A step may add only text that is held back."""
        return bool(self.text or self.logprobs or self.final)

    @property
    def final(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def mean_logprob(self) -> float:
        """Mean of ``logprobs``, which must be those of generated tokens; 0 without any."""
        values = [record.logprob for record in self.logprobs if record.logprob is not None]
        return sum(values) / len(values) if values else 0.0

    @classmethod
    def join(cls, deltas: Iterable[Delta]) -> Delta:
        """Return successive outputs of one completion as one."""
        deltas = list(deltas)
        logprobs = tuple(record for delta in deltas for record in delta.logprobs)
        text, tokens = "".join(delta.text for delta in deltas), sum(delta.tokens for delta in deltas)
        return cls(text, logprobs, deltas[-1].finish_reason, deltas[-1].error, tokens)


class Sequence:
    """State of one completion. Only the engine's worker thread advances it."""

    def __init__(self, prompt: Tokens[int], params: SamplingParams, tokenizer: Tokenizer, deadline: float):
        self.tokens = list(prompt)
        """The prompt and the tokens generated so far."""
        self.prompt_length = len(self.tokens)
        self.params = params
        self.deadline = deadline
        """Seconds on the clock of :func:`time.monotonic`."""
        self.aborted = False
        """Set by :meth:`serve.engine.scheduler.Scheduler.abort`."""
        self.cache: Cache | None = None
        """Cache while the prompt is read. Afterwards the decode batch holds it."""
        self.cache_nbytes = 0
        """Bytes of the cache at the end of the completion."""
        self.drafts: list[int] = []
        """Tokens that may follow, to be checked in the next step (:mod:`serve.engine.speculation`)."""
        self.computed = 0
        """Number of tokens in the cache while the prompt is read."""
        self.cached_tokens = 0
        """Prompt tokens that were found in a kept prefix."""
        self.page_digests: list[bytes] | None = None
        self.boundaries: dict[int, bytes] = {}
        """Prefixes to keep while the prompt is read (:meth:`serve.engine.prefix_cache.PrefixCache.boundaries`)."""
        self.prompt_logprobs: list[TokenLogprob] = []
        own_stop_ids = frozenset(params.stop_token_ids)
        self._stop_ids = own_stop_ids if params.ignore_eos else own_stop_ids | frozenset(tokenizer.stop_ids)
        self.sampler = Sampler(params, self.tokens, self._stop_ids)
        self._tokenizer = tokenizer
        self._prompt_detokenizer = Detokenizer(tokenizer)
        self._prompt_chars = 0
        self._text = GeneratedText(tokenizer, self.tokens, StopStrings(params.stop, tokenizer))
        self._emitted_chars = 0
        self._pending_logprobs: list[TokenLogprob] = []

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that the cache must hold. The last generated token is never fed back."""
        return self.prompt_length + max(0, self.params.max_tokens - 1)

    @property
    def stored_tokens(self) -> int:
        """Tokens in the cache of a running completion."""
        return self.computed if self.cache is not None else len(self.tokens) - 1

    @property
    def prefill_done(self) -> bool:
        return self.computed == len(self.tokens)

    @property
    def needs_prompt_logprobs(self) -> bool:
        """True until the log-probabilities of the prompt, if they were requested, are complete."""
        return self.params.prompt_logprobs and len(self.prompt_logprobs) < self.prompt_length

    @property
    def reserved_tokens(self) -> int:
        """Tokens to reserve memory for before they are read: those so far, and the next one if it will be fed back."""
        return min(len(self.tokens) + 1, self.max_cached_tokens)

    def start(self, cache: Cache) -> None:
        """Take a cache, which holds the first tokens or none. Reading continues after them."""
        self.cache, self.computed = cache, cache.length
        if not self.completion_tokens:
            self.cached_tokens = cache.length

    def take_cache(self) -> Cache | None:
        """Return the cache and give it up."""
        cache, self.cache = self.cache, None
        return cache

    def drop_cache(self) -> None:
        """Give up the cache. All tokens, generated ones included, must be read again."""
        self.cache, self.computed, self.page_digests, self.boundaries, self.drafts = None, 0, None, {}, []
        if len(self.prompt_logprobs) < self.prompt_length:
            self.prompt_logprobs.clear()
            self._prompt_detokenizer, self._prompt_chars = Detokenizer(self._tokenizer), 0

    def add_prompt_logprobs(self, logits: Tensor) -> None:
        """Record the log-probabilities of the tokens that follow the next n prompt tokens, given logits [n, vocab]."""
        start = max(0, len(self.prompt_logprobs) - 1)
        following = self.tokens[start + 1 : min(self.prompt_length, start + 1 + logits.shape[0])]
        n, top = len(following), self.params.logprobs or 0
        records = token_logprobs(logits[:n], following, [top] * n, self._tokenizer.vocab_size) if n else []
        if not self.prompt_logprobs:
            records.insert(0, TokenLogprob(self.tokens[0], None))
        for record in records:
            self.prompt_logprobs.append(record._replace(text_offset=self._prompt_chars))
            self._prompt_chars += len(self._prompt_detokenizer.push(record.token_id))

    def finish_without_tokens(self) -> Delta:
        """Return the output of a completion with ``max_tokens`` 0."""
        return self._finish("", "length", tokens=0)

    def advance(self, token: int, record: TokenLogprob | None) -> Delta:
        """Append a sampled token and return its output. ``record`` is its log-probability, if requested."""
        self.tokens.append(token)
        if record is not None:
            self._pending_logprobs.append(record._replace(text_offset=self._text.decoded_chars))
        if token in self._stop_ids:
            return self._finish("", "stop")
        text, stopped = self._text.push(token)
        if stopped:
            return self._stop(text, tokens=1)
        if self.completion_tokens == self.params.max_tokens:
            return self._finish(text, "length")
        self._emitted_chars += len(text)
        return Delta(text, self._pop_logprobs(), tokens=1)

    def _finish(self, text: str, reason: FinishReason, tokens: int = 1) -> Delta:
        """Finish and emit the text held back so far, unless it completes a stop string."""
        more, stopped = self._text.finish()
        if stopped:
            return self._stop(text + more, tokens)
        logprobs, self._pending_logprobs = tuple(self._pending_logprobs), []
        return Delta(text + more, logprobs, reason, tokens=tokens)

    def _stop(self, text: str, tokens: int) -> Delta:
        """End before a stop string. Tokens of the stop string are not reported."""
        self._emitted_chars += len(text)
        return Delta(text, self._pop_logprobs(), "stop", tokens=tokens)

    def _pop_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Remove and return the log-probabilities of tokens whose text has been emitted, at least in part."""
        if not self._pending_logprobs:
            return ()
        ready = [record for record in self._pending_logprobs if record.text_offset < self._emitted_chars]
        self._pending_logprobs = self._pending_logprobs[len(ready) :]
        return tuple(ready)
