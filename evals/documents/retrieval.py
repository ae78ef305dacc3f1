"""Seeded generators of retrieval documents: facts inserted into real text, with questions at the end.

A fact is a marker, a key, and a value, as in ``@K7``. The document ends with its questions, each of which repeats its
fact: a model that reads ``@K`` must answer ``7``. Every fact ends at least ``window`` tokens before the first question,
outside the sliding window of the token that asks.

Callers remove the characters of keys, values, and marker (:data:`RESERVED`) from the filler text, so that every
occurrence belongs to a fact.
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
    """``tokens`` start with BOS. ``answers`` are token spans [start, end), one value per question."""

    tokens: list[int]
    answers: list[tuple[int, int]]
    kind: str


def reserved_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the IDs of all tokens whose text has :data:`RESERVED` characters, to be kept out of fillers."""
    reserved = set(RESERVED)
    text_ids = filter(tokenizer.is_text, range(tokenizer.vocab_size))
    return [token for token in text_ids if not reserved.isdisjoint(tokenizer.decode([token]))]


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise ConfigError, naming the characters, unless the tokenizer writes facts and restores their text."""
    problem = "tokenizer: decoding does not restore the text of the facts"
    lost = [character for character in RESERVED if tokenizer.decode(tokenizer.encode_inside(character)) != character]
    if lost:
        raise ConfigError(f"{problem}, which consist of {MARKER}, A-Z and 0-9; it cannot write {' '.join(lost)}")
    for key in KEYS:
        for value in VALUES:
            if (text := tokenizer.decode(_Fact(key, value, tokenizer).tokens)) != MARKER + key + value:
                raise ConfigError(f"{problem}; '{MARKER + key + value}' becomes '{text}'")


def mqar(
    rng: random.Random,
    tokenizer: Tokenizer,
    filler: list[int],
    length: int,
    pairs: int,
    window: int,
    rounds: int = 1,
) -> RetrievalDocument:
    """Return a multi-query associative recall document of exactly ``length`` tokens.

    ``pairs`` facts at random positions in ``filler`` are all asked in random order. With several ``rounds``, all facts
    are asked again in a new order each time; a later question can then find its answer in an earlier one. More rounds
    speed up training; evaluation uses one. ``filler`` is tokenized text of at least ``length`` tokens. Raises
    ConfigError if facts and questions do not fit.
    """
    if pairs > len(KEYS):
        raise ConfigError(f"pairs: {pairs} facts need more than the {len(KEYS)} available keys")
    keys = rng.sample(KEYS, pairs)
    facts = [_Fact(key, rng.choice(VALUES), tokenizer) for key in keys]
    return _assemble(rng, tokenizer, filler, length, window, facts, rounds, depth=None, kind="mqar")


def needle(
    rng: random.Random, tokenizer: Tokenizer, filler: list[int], length: int, depth: float, window: int
) -> RetrievalDocument:
    """Return a document of exactly ``length`` tokens with one fact at ``depth``, asked at the end.

    ``depth`` is 0 at the start of the text and 1 at the last position outside the window. ``filler`` is tokenized text
    of at least ``length`` tokens.
    """
    if not 0 <= depth <= 1:
        raise ConfigError(f"depth: expected a value between 0 and 1, found {depth}")
    facts = [_Fact(rng.choice(KEYS), rng.choice(VALUES), tokenizer)]
    return _assemble(rng, tokenizer, filler, length, window, facts, rounds=1, depth=depth, kind="needle")


class _Fact:
    def __init__(self, key: str, value: str, tokenizer: Tokenizer):
        self.question = tokenizer.encode_inside(MARKER + key)
        self.value = tokenizer.encode_inside(value)
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
    text_tokens = questions_start - 1 - fact_tokens  # without BOS and the inserted facts
    last_position = text_tokens - window  # of a fact in the text
    if last_position < 1:
        raise ConfigError(
            f"length: {length} tokens are too few for {len(facts)} facts outside a window of {window} tokens"
            + (f", asked {rounds} times" if rounds > 1 else "")
        )
    if len(filler) < text_tokens:
        raise ConfigError(f"filler: expected at least {text_tokens} tokens of text, found {len(filler)}")
    if depth is not None:
        positions = [round(depth * last_position)]
    else:
        positions = sorted(rng.randrange(last_position + 1) for _ in facts)
    tokens = [tokenizer.bos_id]
    cursor = 0
    for fact, position in zip(facts, positions):
        tokens += filler[cursor:position] + fact.tokens
        cursor = position
    tokens += filler[cursor:text_tokens]
    answers = []
    for _ in range(rounds):
        for fact in rng.sample(facts, len(facts)):
            tokens += fact.question
            answers.append((len(tokens), len(tokens) + len(fact.value)))
            tokens += fact.value
    return RetrievalDocument(tokens, answers, kind)
