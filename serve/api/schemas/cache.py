"""Response of the cache route."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class CacheSize(BaseModel):
    bytes: int
    components: dict[str, int]
    """Bytes by component, such as ``csa``, ``index``, ``window``, ``tail`` and ``state``."""


class SequenceCache(CacheSize):
    """Cache of a running completion. Pages that it shares with a kept prefix or another completion count in full."""

    tokens: int
    """Tokens in the cache."""
    prompt_tokens: int
    completion_tokens: int
    shared_tokens: int
    """Prompt tokens that were found in a kept prefix."""
    times_smaller: float | None
    """Than the reference's cache of as many tokens."""


class Pages(BaseModel):
    used: int
    free: int
    tokens: int
    """Tokens per page."""
    bytes: int
    """Bytes per page."""


class KeptPrefixes(BaseModel):
    count: int
    capacity: int


class CacheReport(BaseModel):
    object: Literal["cache"] = "cache"
    total: CacheSize
    """Bytes of running completions and kept prefixes; shared pages count once."""
    sequences: list[SequenceCache]
    pages: Pages
    kept_prefixes: KeptPrefixes
    reference: str
    """Model that the caches are compared with."""
    times_smaller_at_full_context: float
