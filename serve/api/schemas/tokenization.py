"""Requests of the tokenizer routes."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import PlainValidator

from serve.api.schemas.base import ModelName, RequestBody, parse_tokens


class TokenizeRequest(RequestBody):
    """``POST /tokenize``."""

    prompt: str
    add_special_tokens: bool = True
    """Prepend BOS."""
    parse_special: bool = False
    """Read spellings of special tokens as these tokens."""
    model: ModelName | None = None

    required: ClassVar = {"prompt": "a string"}
    neutral_values: ClassVar = {"return_token_strs": (False,)}


class DetokenizeRequest(RequestBody):
    """``POST /detokenize``."""

    tokens: Annotated[list[int], PlainValidator(parse_tokens, json_schema_input_type=list[int])]
    model: ModelName | None = None

    required: ClassVar = {"tokens": "a list of token IDs"}
