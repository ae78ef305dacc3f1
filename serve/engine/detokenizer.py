"""Text that comes one token at a time: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from model.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A UTF-8 character has at most four bytes, so at most three tokens of an unfinished one have come.
_MOST_UNFINISHED = 3
_CONTEXT = 4


class Detokenizer:
    """Turns tokens into text as they come.

    Tokens are decoded together with a few before them, because a tokenizer may join neighbours (spaces, bytes of one
    character). Characters that later bytes may still change are held back.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._window = self._tail(context) or list(context[-_CONTEXT:])
        self._sent = len(tokenizer.decode(self._window))
        self._unfinished = 0
        """Tokens since the text last ended with a whole character."""

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` settles; may be empty, or hold what earlier tokens left open."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        held = len(text) - len(text.rstrip(REPLACEMENT))
        self._unfinished = self._unfinished + 1 if held else 0
        if self._unfinished > _MOST_UNFINISHED:
            held = min(held, _MOST_UNFINISHED)  # the first of these bytes will never be a character
        settled = len(text) - held
        piece = text[self._sent : settled]
        self._sent = max(self._sent, settled)
        if not held and len(self._window) > 2 * _CONTEXT and (tail := self._tail(self._window)):
            self._window = tail
            self._sent = len(self._tokenizer.decode(tail))
        return piece

    def flush(self) -> str:
        """What is still held back; no token follows."""
        piece = self._tokenizer.decode(self._window)[self._sent :]
        self._sent += len(piece)
        return piece

    def _tail(self, tokens: Sequence[int]) -> list[int]:
        """The last few of ``tokens``, beginning with a whole character; empty where none of the few begins so."""
        for length in range(_CONTEXT, 2 * _CONTEXT):
            tail = list(tokens[-length:])
            if REPLACEMENT not in self._tokenizer.decode(tail):
                return tail
        return []


class StopStrings:
    """Cuts text before the first of some stop strings, wherever the pieces of text begin and end."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._pending = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(text that is certainly before any stop string, whether a stop string was found)."""
        self._pending += piece
        found = [at for at in (self._pending.find(stop) for stop in self._stops) if at >= 0]
        if found:
            text, self._pending = self._pending[: min(found)], ""
            return text, True
        keep = max((_overlap(self._pending, stop) for stop in self._stops), default=0)
        cut = len(self._pending) - keep
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text, False

    def flush(self) -> str:
        """What is held back as the possible beginning of a stop string; no text follows."""
        text, self._pending = self._pending, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
