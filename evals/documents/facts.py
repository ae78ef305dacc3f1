"""Spelling of generated documents: markers, keys and values, and their tokens.

A fact is a marker, a key and a value, as in ``@K7``. Callers remove these characters (:data:`RESERVED`) from the filler
text, so that every occurrence belongs to a fact or a question.
"""

from __future__ import annotations

import string

from model.errors import ConfigError
from model.tokenizer import Tokenizer

MARKER = "@"
KEYS = string.ascii_uppercase
VALUES = string.digits
RESERVED = MARKER + KEYS + VALUES


class Speller:
    """Tokens of pieces of facts, encoded once each."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._tokens: dict[str, list[int]] = {}

    def __call__(self, piece: str) -> list[int]:
        """Return the tokens of ``piece`` as it stands inside a text."""
        if piece not in self._tokens:
            self._tokens[piece] = self.tokenizer.encode_inside(piece)
        return self._tokens[piece]

    def check(self) -> None:
        """Raise ConfigError, naming the characters, unless the tokenizer writes facts and restores their text."""
        problem = "the tokenizer does not restore the text of facts"
        decode = self.tokenizer.decode
        lost = [character for character in RESERVED if decode(self(character)) != character]
        if lost:
            raise ConfigError(f"{problem}, which consist of {MARKER}, A-Z and 0-9; it cannot write {' '.join(lost)}")
        for key in KEYS:
            for pieces in ((MARKER + key, value) for value in (*VALUES, *KEYS)):
                if (text := decode([token for piece in pieces for token in self(piece)])) != "".join(pieces):
                    raise ConfigError(f"{problem}; '{''.join(pieces)}' becomes '{text}'")


def reserved_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the IDs of all tokens whose text has :data:`RESERVED` characters, to be kept out of fillers."""
    reserved = set(RESERVED)
    text_ids = filter(tokenizer.is_text, range(tokenizer.vocab_size))
    return [token for token in text_ids if not reserved.isdisjoint(tokenizer.decode([token]))]
