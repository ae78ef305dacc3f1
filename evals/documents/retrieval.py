"""Seeded generators of retrieval documents: facts planted in real text, asked for at the end.

A fact is a marker, a key and a value, as in ``@K7``. The document ends with its questions, each the fact once more: a
model that reads ``@K`` must answer ``7``. Every fact ends at least ``window`` tokens before the first question, outside
the sliding window of the token that asks.

Keys, values and the marker are characters that callers keep out of the text around them (:data:`RESERVED`), so that
recall is measured and not the parsing of one.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from model.errors import ConfigError
from model.tokenizer import Tokenizer

MARKER = "@"
KEYS = string.ascii_uppercase
VALUES = string.digits
RESERVED = MARKER + KEYS + VALUES


@dataclass(frozen=True)
class RetrievalDocument:
    """``tokens`` begin with BOS; ``answers`` are token spans [start, end), each the value of one question."""

    tokens: list[int]
    answers: list[tuple[int, int]]
    kind: str


def reserved_ids(tokenizer: Tokenizer) -> list[int]:
    """Token ids to keep out of fillers: those that write the :data:`RESERVED` characters one by one."""
    return sorted({token for character in RESERVED for token in tokenizer.encode(character)})


def mqar(
    rng: random.Random,
    tokenizer: Tokenizer,
    filler: list[int],
    length: int,
    pairs: int,
    window: int,
    rounds: int = 1,
) -> RetrievalDocument:
    """Multi-query associative recall: ``pairs`` facts at random places in ``filler``, all asked in random order.

    With several ``rounds`` all of them are asked again, each time in another order; a later question may then find its
    answer in an earlier one. More rounds teach sooner, one round measures.
    The document has exactly ``length`` tokens. ``filler`` is tokenised text, at least ``length`` tokens of it.
    Raises ConfigError when the facts and their questions do not fit.
    """
    if pairs > len(KEYS):
        raise ConfigError(f"pairs: {pairs} facts need more than the {len(KEYS)} keys there are")
    keys = rng.sample(KEYS, pairs)
    facts = [_Fact(key, rng.choice(VALUES), tokenizer) for key in keys]
    return _assemble(rng, tokenizer, filler, length, window, facts, rounds, depth=None, kind="mqar")


def needle(
    rng: random.Random, tokenizer: Tokenizer, filler: list[int], length: int, depth: float, window: int
) -> RetrievalDocument:
    """One fact at ``depth`` (0 = start of the text, 1 = the last place outside the window), asked at the end.

    The document has exactly ``length`` tokens. ``filler`` is tokenised text, at least ``length`` tokens of it.
    """
    if not 0 <= depth <= 1:
        raise ConfigError(f"depth: must lie between 0 and 1, found {depth}")
    facts = [_Fact(rng.choice(KEYS), rng.choice(VALUES), tokenizer)]
    return _assemble(rng, tokenizer, filler, length, window, facts, rounds=1, depth=depth, kind="needle")


class _Fact:
    def __init__(self, key: str, value: str, tokenizer: Tokenizer):
        self.question = tokenizer.encode(MARKER + key)
        self.value = tokenizer.encode(value)
        self.tokens = self.question + self.value


def _assemble(
    rng: random.Random,
    tokenizer: Tokenizer,
    filler: list[int],
    length: int,
    window: int,
    facts: list[_Fact],
    rounds: int,
    depth: float | None,
    kind: str,
) -> RetrievalDocument:
    fact_tokens = sum(len(fact.tokens) for fact in facts)
    questions_start = length - rounds * fact_tokens
    text_tokens = questions_start - 1 - fact_tokens  # BOS, and the planted facts
    room = text_tokens - window  # text positions at which a fact may start
    if room < 1:
        raise ConfigError(
            f"length: {length} tokens are too few for {len(facts)} facts outside a window of {window} tokens"
            + (f", asked {rounds} times" if rounds > 1 else "")
        )
    if len(filler) < text_tokens:
        raise ConfigError(f"filler: {len(filler)} tokens of text where {text_tokens} are needed")
    places = [round(depth * room)] if depth is not None else sorted(rng.randrange(room + 1) for _ in facts)
    tokens = [tokenizer.bos_id]
    cursor = 0
    for fact, place in zip(facts, places):
        tokens += filler[cursor:place] + fact.tokens
        cursor = place
    tokens += filler[cursor:text_tokens]
    answers = []
    for _ in range(rounds):
        for fact in rng.sample(facts, len(facts)):
            tokens += fact.question
            answers.append((len(tokens), len(tokens) + len(fact.value)))
            tokens += fact.value
    return RetrievalDocument(tokens, answers, kind)
