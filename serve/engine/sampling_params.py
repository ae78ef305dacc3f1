"""Sampling parameters of one completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one completion. The HTTP schema validates the values.

    Logits are changed in this order: penalties, ``logit_bias``, ``min_tokens``; then ``temperature``, ``top_k``,
    ``top_p`` and ``min_p`` decide the distribution that is sampled.
    """

    max_tokens: int = 16
    """Maximum number of tokens to generate; 0 only prefills the prompt."""
    min_tokens: int = 0
    """Number of tokens before which no token that ends generation is sampled."""
    temperature: float = 1.0
    """0 selects the most likely token."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities sum to at least this."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps the whole vocabulary."""
    min_p: float = 0.0
    """Keep tokens that are at least this likely relative to the most likely token."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the completion (CTRL,
    arXiv:1909.05858, section 4.1)."""
    presence_penalty: float = 0.0
    """Subtracted from logits of tokens in the completion."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each of its occurrences in the completion."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token IDs."""
    seed: int | None = None
    """A seed makes the draws reproducible, regardless of concurrent requests; None uses a random seed."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings. A string may spell special tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Token IDs that end the completion, in addition to the tokenizer's."""
    ignore_eos: bool = False
    """Continue after the tokenizer's end-of-sequence tokens."""
    logprobs: int | None = None
    """Number of alternatives to report per token; 0 reports the sampled token alone, None reports nothing."""
    prompt_logprobs: bool = False
    """Report the prompt's tokens as well."""
