"""Generated retrieval documents of a split."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import numpy as np

from evals.documents import retrieval
from model.errors import ConfigError
from model.tokenizer import Tokenizer
from pipelines.data.manifest import Kind, Split
from pipelines.recipe.schema import Recipe


@dataclass(frozen=True)
class StoredDocument:
    """A document, or a piece of a long one: one row of a shard."""

    document_id: str
    piece: int
    source: str
    kind: Kind
    tokens: np.ndarray
    answers: list[tuple[int, int]]
    """Token spans [start, end)."""


class RetrievalGenerator:
    """Generates retrieval documents of one split, from the split's own random seed."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, split: Split):
        self._data = recipe.data
        self._window = max(recipe.model.window, recipe.data.answer_distance or 0)
        self._tokenizer = tokenizer
        self._split = split
        self._rng = random.Random(f"{recipe.data.seed} {split}")

    def check(self) -> None:
        """Raise ConfigError if the tokenizer cannot write facts and questions, or if these do not fit into documents of
        the configured lengths."""
        try:
            retrieval.check_tokenizer(self._tokenizer)
        except ConfigError as error:
            reason = str(error).removeprefix("tokenizer: ")
            raise ConfigError(f"data.tokenizer: {self._data.tokenizer}: {reason}") from error
        longest = self._data.sequence_length
        for length in self._data.retrieval_lengths:
            if length > longest:
                raise ConfigError(f"data.retrieval_lengths: {length} exceeds data.sequence_length {longest}")
        for length in {longest, *self._data.retrieval_lengths}:
            try:
                if self._data.needle_share < 1:
                    self._mqar([0] * length, full=True)
                if self._data.needle_share > 0:
                    self._needle([0] * length)
            except ConfigError as error:
                keys = "data.pairs, data.rounds, data.answer_distance and model.window"
                lengths = "data.sequence_length and data.retrieval_lengths"
                raise ConfigError(f"{keys} must fit {lengths}: {str(error).removeprefix('length: ')}") from error

    def generate(self, text: np.ndarray) -> StoredDocument:
        """Plant facts in a random slice of ``text``, int32 of at least ``sequence_length`` tokens."""
        length = self._data.sequence_length
        if self._split == "train" and self._data.retrieval_lengths:
            length = self._rng.choice(self._data.retrieval_lengths)
        start = self._rng.randrange(len(text) - length + 1)
        filler = text[start : start + length].tolist()
        document = self._needle(filler) if self._rng.random() < self._data.needle_share else self._mqar(filler)
        tokens = np.array(document.tokens, dtype=np.int32)
        document_id = hashlib.sha256(tokens.tobytes()).hexdigest()[:32]
        kind: Kind = "needle" if document.kind == "needle" else "mqar"
        return StoredDocument(document_id, 0, "generated", kind, tokens, document.answers)

    def _mqar(self, filler: list[int], full: bool = False) -> retrieval.RetrievalDocument:
        """``full`` asks for the maximum of pairs and rounds instead of drawing them."""
        data, rng = self._data, self._rng
        pairs, rounds = data.pairs, 1
        if self._split == "train" and not full:
            pairs, rounds = rng.randint(min(2, pairs), pairs), rng.randint(1, data.rounds)
        elif full:
            rounds = data.rounds
        return retrieval.mqar(rng, self._tokenizer, filler, len(filler), pairs, self._window, rounds)

    def _needle(self, filler: list[int]) -> retrieval.RetrievalDocument:
        depth = self._rng.random()
        return retrieval.needle(self._rng, self._tokenizer, filler, len(filler), depth, self._window)
