"""Text of a stream of tokens: complete characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from model.tokenizer.base import MAX_UNFINISHED_TOKENS, REPLACEMENT, Tokenizer
from model.tokenizer.stop_strings import StopStringFilter, StopStrings

CONTEXT_TOKENS = 4
_MAX_WINDOW_TOKENS = 24
"""Tokens after which the decoded window is reduced to the context of further ones. Decoding this many costs less than
looking for the context more often."""


def decoding_context(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Return the last tokens of ``ids`` that decoding of further tokens depends on.

    A tokenizer may join neighbors (spaces, bytes of one character), so 4 to 7 tokens are returned, from the start of a
    character if there is one, and up to three more if the text ends inside a character.
    """
    recent = islice((i for i in reversed(ids) if tokenizer.is_text(i)), 2 * CONTEXT_TOKENS + MAX_UNFINISHED_TOKENS)
    tail = list(recent)[::-1]
    for end in range(len(tail), max(-1, len(tail) - MAX_UNFINISHED_TOKENS - 1), -1):
        for start in range(max(0, end - CONTEXT_TOKENS), max(-1, end - 2 * CONTEXT_TOKENS), -1):
            if REPLACEMENT not in tokenizer.decode(tail[start:end]):
                return tail[start:]
    return tail[-CONTEXT_TOKENS:]


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


class GeneratedText:
    """Decode generated tokens that follow ``context``, truncated before the first of ``stops``."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stops: StopStrings):
        self._detokenizer = Detokenizer(tokenizer, context)
        self._stops, self._filter = stops, StopStringFilter(stops.patterns)
        self.decoded_chars = 0
        """Number of final characters, including those held back as a possible stop string."""

    def push(self, token_id: int) -> tuple[str, bool]:
        """Append a token. Return the text that precedes any possible stop string, and whether one was found."""
        piece = self._detokenizer.push(token_id)
        self.decoded_chars += len(piece)
        return self._filter.push(piece or self._stops.mark(token_id))

    def finish(self) -> tuple[str, bool]:
        """Return the text held back, at the end of the stream, and whether its end completes a stop string."""
        text, stopped = self._filter.push(self._detokenizer.flush())
        return (text if stopped else text + self._filter.flush()), stopped
