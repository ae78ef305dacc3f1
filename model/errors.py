"""Errors that a user can act on. Each message is one sentence that names the offending thing.

The command line prints them without a traceback and returns a non-zero status; the server turns them into a 4xx.
"""

import difflib
import re
from collections.abc import Iterable


class FiftyfoldError(Exception):
    """Base of all errors whose message is meant for the user."""


class ConfigError(FiftyfoldError):
    """A setting that is unknown, has the wrong type, is out of range, or contradicts another.

    ``field`` is the setting's name in the code that raises the error; it precedes ``reason`` in the message. Callers
    may replace it with a user-facing name, such as a dotted key.
    """

    def __init__(self, reason: str, field: str | None = None):
        super().__init__(reason)
        self.reason = reason
        self.field = field

    def __str__(self) -> str:
        return self.reason if self.field is None else f"{self.field}: {self.reason}"


class DataError(FiftyfoldError):
    """Input text or token shards that are missing, empty or damaged."""


class CheckpointError(FiftyfoldError):
    """A checkpoint folder that is missing, incomplete or does not fit its configuration."""


class CacheError(FiftyfoldError):
    """An operation that the cache cannot perform in its present state."""


MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
"""Errors of parsing a damaged JSON file, and of taking values out of it."""


_MAX_WORD = 100


def shorten_words(text: str) -> str:
    """Return ``text`` without the middle of words of more than 100 characters, such as numbers with many digits."""
    half = _MAX_WORD // 2 - 1
    return re.sub(rf"\S{{{_MAX_WORD + 1},}}", lambda word: f"{word[0][:half]}…{word[0][-half:]}", text)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, in Python or in torch, whose CPU allocator raises plain RuntimeError."""
    if isinstance(error, RuntimeError):
        return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError)


def unknown_key(key: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown ``key`` whose last part is ``name``, with the most similar known name if
    any."""
    return f"{shorten_words(key)}: unknown key{did_you_mean(name, known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message, ``; did you mean '...'?`` with the most similar known name; empty if none is
    similar."""
    close = difflib.get_close_matches(name, list(known), n=1) if len(name) <= _MAX_WORD else []
    return f"; did you mean '{close[0]}'?" if close else ""
