"""Stop strings, which may contain special tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable

from model.tokenizer.base import Tokenizer

_MARKS = range(0xD800, 0xE000)
"""Unpaired surrogates. Decoded text never holds them."""
_MARK = re.compile("[\ud800-\udfff]")


class StopStrings:
    """Stop strings as patterns to find in text.

    Decoding omits special tokens. In a pattern, one character, the token's *mark*, stands for each special token that
    a stop string spells; the text to search must hold :meth:`mark` in place of such a token. Ordinary tokens that
    spell the same characters match too.
    """

    def __init__(self, stops: Iterable[str], tokenizer: Tokenizer):
        stops = tuple(stops)
        spellings = [name for name in tokenizer.special_tokens if any(name in stop for stop in stops)]
        marks = {name: chr(_MARKS[number]) for number, name in enumerate(spellings)}
        self._marks = {tokenizer.special_tokens[name]: mark for name, mark in marks.items()}
        longest_first = sorted(map(re.escape, spellings), key=len, reverse=True)
        marked = [re.sub("|".join(longest_first), lambda m: marks[m[0]], stop) for stop in stops] if marks else []
        self.patterns = tuple(dict.fromkeys([*stops, *marked]))

    def mark(self, token_id: int) -> str:
        """Return the character that stands for a token in the patterns, or an empty string."""
        return self._marks.get(token_id, "")


def remove_marks(text: str) -> str:
    """Return ``text`` without marks."""
    return _MARK.sub("", text)
