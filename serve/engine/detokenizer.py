"""Incremental detokenization: emit complete characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from model.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A UTF-8 character has at most four bytes, so an incomplete one has at most three.
_MAX_INCOMPLETE_TOKENS = 3
_CONTEXT_TOKENS = 4


class Detokenizer:
    """Decode a stream of tokens incrementally.

    Each token is decoded together with a few preceding tokens, because a tokenizer may join neighbors (spaces, bytes
    of one character). Characters that later bytes may still change are held back.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._window = self._tail(context) or list(context[-_CONTEXT_TOKENS:])
        self._emitted = len(tokenizer.decode(self._window))
        """Characters of the decoded window that have been returned."""
        self._incomplete = 0
        """Tokens since the text last ended with a complete character."""

    def push(self, token_id: int) -> str:
        """Append a token and return the text that became final, possibly empty."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        held = len(text) - len(text.rstrip(REPLACEMENT))
        self._incomplete = self._incomplete + 1 if held else 0
        if self._incomplete > _MAX_INCOMPLETE_TOKENS:
            held = min(held, _MAX_INCOMPLETE_TOKENS)  # the oldest of these bytes can no longer become a character
        final = len(text) - held
        piece = text[self._emitted : final]
        self._emitted = max(self._emitted, final)
        if not held and len(self._window) > 2 * _CONTEXT_TOKENS and (tail := self._tail(self._window)):
            self._window = tail
            self._emitted = len(self._tokenizer.decode(tail))
        return piece

    def flush(self) -> str:
        """Return the text still held back, at the end of the stream."""
        piece = self._tokenizer.decode(self._window)[self._emitted :]
        self._emitted += len(piece)
        return piece

    def _tail(self, tokens: Sequence[int]) -> list[int]:
        """Return the shortest suffix of 4 to 7 tokens that starts with a complete character, or an empty list."""
        for length in range(_CONTEXT_TOKENS, 2 * _CONTEXT_TOKENS):
            tail = list(tokens[-length:])
            if REPLACEMENT not in self._tokenizer.decode(tail):
                return tail
        return []


class StopStringFilter:
    """Truncate streamed text before the first stop string, which may span several pieces."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._pending = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Append text. Return the text that precedes any possible stop string, and whether one was found."""
        self._pending += piece
        found = [at for at in (self._pending.find(stop) for stop in self._stops) if at >= 0]
        if found:
            text, self._pending = self._pending[: min(found)], ""
            return text, True
        held = max((_overlap(self._pending, stop) for stop in self._stops), default=0)
        cut = len(self._pending) - held
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text, False

    def flush(self) -> str:
        """Return the text held back as a possible start of a stop string, at the end of the stream."""
        text, self._pending = self._pending, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
