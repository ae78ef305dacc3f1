"""Stop strings, which may contain special tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

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


class StopStringFilter:
    """Truncate streamed text before the first of ``patterns``, which may span several pieces.

    Patterns and pieces may hold marks of special tokens (:class:`StopStrings`); returned text does not.
    """

    def __init__(self, patterns: Sequence[str]):
        self._patterns = tuple(patterns)
        self._pending = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Append text. Return the text that precedes any possible stop string, and whether one was found."""
        if not self._patterns:
            return piece, False
        self._pending += piece
        found = [at for at in (self._pending.find(pattern) for pattern in self._patterns) if at >= 0]
        if found:
            text, self._pending = self._pending[: min(found)], ""
            return remove_marks(text), True
        held = max((_overlap(self._pending, pattern) for pattern in self._patterns), default=0)
        cut = len(self._pending) - held
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return remove_marks(text), False

    def flush(self) -> str:
        """Return the text held back as a possible start of a stop string, at the end of the stream."""
        text, self._pending = self._pending, ""
        return remove_marks(text)


def remove_marks(text: str) -> str:
    """Return ``text`` without marks."""
    return _MARK.sub("", text)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
