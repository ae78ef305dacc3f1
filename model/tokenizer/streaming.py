"""Text that grows token by token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from model.tokenizer.base import REPLACEMENT, Tokenizer

CONTEXT_TOKENS = 4
_MAX_UNFINISHED_TOKENS = 3
"""A UTF-8 character has at most four bytes, so an unfinished one has at most three."""


def decoding_context(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Return the last tokens of ``ids`` that decoding of further tokens depends on.

    A tokenizer may join neighbors (spaces, bytes of one character), so 4 to 7 tokens are returned, from the start of a
    character if there is one, and up to three more if the text ends inside a character.
    """
    recent = islice((i for i in reversed(ids) if tokenizer.is_text(i)), 2 * CONTEXT_TOKENS + _MAX_UNFINISHED_TOKENS)
    tail = list(recent)[::-1]
    for end in range(len(tail), max(-1, len(tail) - _MAX_UNFINISHED_TOKENS - 1), -1):
        for start in range(max(0, end - CONTEXT_TOKENS), max(-1, end - 2 * CONTEXT_TOKENS), -1):
            if REPLACEMENT not in tokenizer.decode(tail[start:end]):
                return tail[start:]
    return tail[-CONTEXT_TOKENS:]


def has_unfinished_character(tokenizer: Tokenizer, ids: list[int], text: str) -> bool:
    """Return whether further bytes may complete the last character of ``text``, the decoding of ``ids``."""
    return text.endswith(REPLACEMENT) and any(
        not tokenizer.decode([*ids, *[byte] * count]).startswith(text)
        for byte in tokenizer.continuation_ids
        for count in range(1, _MAX_UNFINISHED_TOKENS + 1)
    )
