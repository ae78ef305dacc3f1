"""Incremental detokenization: emit complete characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from model.tokenizer import Tokenizer
from model.tokenizer.stop_strings import remove_marks
from model.tokenizer.streaming import decoding_context

_MAX_WINDOW_TOKENS = 24
"""Tokens after which the decoded window is reduced to the context of further ones. Decoding this many costs less than
looking for the context more often."""


class Detokenizer:
    """Decode a stream of tokens that follow ``context`` incrementally.

    Each token is decoded together with a few preceding tokens, because a tokenizer may join neighbors (spaces, bytes
    of one character). A character that later bytes may still complete is held back. If ``context`` ends inside a
    character, that character belongs to the stream.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._window = decoding_context(tokenizer, context)
        self._emitted = self._final_length(tokenizer.decode(self._window))
        """Characters of the decoded window that have been returned."""

    def push(self, token_id: int) -> str:
        """Append a token and return the text that became final, possibly empty."""
        if not self._tokenizer.is_text(token_id):
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        final = self._final_length(text)
        piece = text[self._emitted : final]
        self._emitted = max(self._emitted, final)
        if final == len(text) and len(self._window) >= _MAX_WINDOW_TOKENS:
            self._window = decoding_context(self._tokenizer, self._window)
            self._emitted = len(self._tokenizer.decode(self._window))
        return piece

    def flush(self) -> str:
        """Return the text still held back, at the end of the stream."""
        piece = self._tokenizer.decode(self._window)[self._emitted :]
        self._emitted += len(piece)
        return piece

    def _final_length(self, text: str) -> int:
        return len(text) - self._tokenizer.ends_inside_character(self._window, text)


def finished_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of ``ids`` without a character that they leave unfinished."""
    context, text = decoding_context(tokenizer, ids), tokenizer.decode(ids)
    unfinished = tokenizer.ends_inside_character(context, tokenizer.decode(context))
    return text[: len(text) - unfinished]


class StopStringFilter:
    """Truncate streamed text before the first of ``patterns``, which may span several pieces.

    Patterns and pieces may hold marks of special tokens (:mod:`model.tokenizer.stop_strings`); returned text does not.
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


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
