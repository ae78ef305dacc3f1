"""Base of request schemas."""

import pytest

from serve.api.schemas.chat import ChatRequest
from serve.api.schemas.completions import CompletionRequest
from serve.api.schemas.generation import StreamOptions
from serve.api.schemas.tokenization import DetokenizeRequest, TokenizeRequest


@pytest.mark.parametrize("schema", [ChatRequest, CompletionRequest, StreamOptions, DetokenizeRequest, TokenizeRequest])
def test_every_required_field_has_an_expected_value(schema) -> None:
    required = {name for name, field in schema.model_fields.items() if field.is_required()}
    assert set(schema.required) == required
