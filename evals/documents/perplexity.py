"""Perplexity by position: spans of held-out real documents, scored after all that comes before them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from evals.documents.base import Task
from model.errors import ConfigError, DataError
from model.tokenizer import Tokenizer
from model.tokenizer.base import REPLACEMENT
from model.wording import count

MAX_SHIFTS = 64
"""Maximum number of tokens that the start of a span moves to reach a split point. Encoding the two sides of it
separately yields the same tokens."""


@dataclass(frozen=True)
class Perplexity(Task):
    """The log-likelihood of ``tokens`` tokens that end at ``depth`` times the document's length."""

    name = "perplexity"
    metric = "likelihood"
    per_depth = True
    chance: ClassVar[float] = 0.0
    depth: float = 1.0
    tokens: int = 32

    def check(self) -> None:
        self.require("tokens", 1, 1 << 16, "these tokens are scored")
        if not 0 < self.depth <= 1:
            raise ConfigError(f"must be above 0 and at most 1, found {self.depth}", f"{self.name}.depth")

    def span(self, rng: random.Random, tokenizer: Tokenizer, text: list[int], length: int) -> tuple[str, str, int]:
        """Return (context, continuation, tokens of the continuation) from ``text``, the tokens of a document.

        The text begins at a random position, the same for equal ``rng`` at every depth. Raises ConfigError if the span
        starts before the document, and DataError if there is no split point.
        """
        end = round(self.depth * (length - 1))  # without BOS
        if end - self.tokens < 1:
            raise ConfigError(
                f"{length} is too short, because the {count(self.tokens, 'token')} before depth {self.depth:g} have no "
                f"context; raise the length or the depth, or lower the task's setting 'tokens'",
                "length",
            )
        begin = rng.randrange(len(text) - (length - 1) + 1)
        # A slice of tokens may cut characters at its ends.
        whole = tokenizer.decode(text[begin : begin + end]).strip(REPLACEMENT)
        # The text as its tokens spell it: a tokenizer may add a space at the start, or normalize characters.
        whole = tokenizer.decode(tokenizer.encode(whole)[:end])
        ids = tokenizer.encode(whole)
        for start in range(len(ids) - self.tokens, max(0, len(ids) - self.tokens - MAX_SHIFTS), -1):
            context = tokenizer.decode(ids[:start]).rstrip()  # lm-eval moves spaces at its end to the continuation
            before = tokenizer.encode(context)
            if context and whole.startswith(context) and ids[: len(before)] == before and len(ids) <= end:
                return context, whole[len(context) :], len(ids) - len(before)
        raise DataError(
            f"{self.name}: no split point within {MAX_SHIFTS} tokens keeps the token IDs of a {length}-token document "
            "unchanged"
        )
