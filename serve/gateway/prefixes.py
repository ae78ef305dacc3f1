"""Digests of the beginnings of prompts, by which the gateway finds the longest beginning that two prompts share.

It sends prompts with a common beginning to the same replica, which may have kept that prefix
(:mod:`serve.engine.prefix_cache`). It has no tokenizer, so it digests the prompt's text or its token IDs.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SHORTEST = 128
"""Length of the shortest prefix with a digest, in UTF-8 bytes; token IDs count as 4 each."""
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class RoutingInfo:
    """The part of a request body that routing needs."""

    model: Any = None
    """Value of the field; None if it is missing."""
    prefix: tuple[bytes, ...] = ()


def parse_routing(body: bytes) -> RoutingInfo:
    """Return the model and the prefix digests of a JSON body; none for a malformed body, whose error the replica
    reports."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):  # also UnicodeDecodeError and integers with too many digits
        return RoutingInfo()
    if not isinstance(fields, dict):
        return RoutingInfo()
    return RoutingInfo(fields.get("model"), prefix_digests(_prompt_bytes(fields)))


def prefix_digests(prompt: bytes) -> tuple[bytes, ...]:
    """Return digests of the first 128, 192, 256, 384, 512, 768, ... bytes of ``prompt``, as far as it goes."""
    state, digests, done = hashlib.blake2b(digest_size=16), [], 0
    for length in _lengths(len(prompt)):
        state.update(prompt[done:length])
        digests.append(state.copy().digest())
        done = length
    return tuple(digests)


def _lengths(most: int) -> Iterator[int]:
    length = SHORTEST
    while length <= most:
        yield length
        if length * 3 // 2 <= most:
            yield length * 3 // 2
        length *= 2


def _prompt_bytes(fields: dict[str, Any]) -> bytes:
    """Return the beginning of a prompt or of chat messages as bytes. Of a batch, the first prompt counts."""
    prompt = fields.get("prompt")
    if prompt is None:
        messages = fields.get("messages")
        return json.dumps(messages).encode() if isinstance(messages, list) else b""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt.encode("utf-8", "surrogatepass")
    try:
        tokens = array("i", prompt)
    except (TypeError, OverflowError):  # the replica reports the error
        return b""
    assert tokens.itemsize == _BYTES_PER_TOKEN
    return tokens.tobytes()
