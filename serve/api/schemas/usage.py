"""Token counts and cache bytes of a response."""

from __future__ import annotations

from pydantic import BaseModel


class PromptTokensDetails(BaseModel):
    cached_tokens: int
    """Prompt tokens that were found in a kept prefix and not read again."""


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Extension(BaseModel):
    """Fields that OpenAI's API does not have."""

    cache_nbytes: int
    """Bytes of this request's caches, summed over their storages."""
