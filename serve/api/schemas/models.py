"""Responses that describe the served model."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fiftyfold"
    version: str | None
    """Version of the model registry; null for a checkpoint folder."""
    max_model_len: int
    """Maximum tokens of prompt and completion together."""
    cache_bytes_per_token: float
    """Bytes per token of a full context, summed over the cache's storages."""
    chat_template: str
    """File of the chat template, or ``built-in`` if the checkpoint has none."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
