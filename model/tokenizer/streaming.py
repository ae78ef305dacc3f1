"""Text that grows token by token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from model.tokenizer.base import MAX_UNFINISHED_TOKENS, REPLACEMENT, Tokenizer

CONTEXT_TOKENS = 4


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
