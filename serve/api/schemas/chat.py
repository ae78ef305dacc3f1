"""Request and response of OpenAI's chat completions API."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, PlainValidator, model_validator

from serve.api.schemas.base import Integer
from serve.api.schemas.generation import GenerationRequest
from serve.api.schemas.messages import EXPECTED_MESSAGES, parse_messages, parse_tools
from serve.api.schemas.neutral_fields import CHAT_NEUTRAL_TYPES, CHAT_NEUTRAL_VALUES
from serve.api.schemas.usage import Extension, Usage
from serve.api.schemas.validation import field_error, quote_value

MAX_TOP_LOGPROBS = 20
MAX_TEMPLATE_VARIABLES = 64


def _parse_tool_choice(value: Any) -> str:
    if value not in ("auto", "none"):
        raise ValueError(f'expected "auto" or "none", found {quote_value(value)}; the server does not force tool calls')
    return value


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``.

    The messages are rendered by the model's chat template (:mod:`serve.api.chat_template`).
    """

    messages: Annotated[
        list[dict[str, Any]], PlainValidator(parse_messages, json_schema_input_type=list[dict[str, Any]])
    ]
    max_tokens: Annotated[Integer, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[Integer, Field(ge=0)] | None = None
    """Another name of ``max_tokens``. Without either, the answer may fill the context."""
    logprobs: bool = False
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Alternatives per token, if ``logprobs`` is true."""
    tools: Annotated[
        list[dict[str, Any]], PlainValidator(parse_tools, json_schema_input_type=list[dict[str, Any]] | None)
    ] = Field(default=[])
    """Passed to the template. The answer is text; calls in it are not parsed."""
    tool_choice: Annotated[
        str | None, PlainValidator(_parse_tool_choice, json_schema_input_type=Literal["auto", "none"] | None)
    ] = None
    """``none`` withholds the tools from the template."""
    add_generation_prompt: bool = True
    """End the prompt with the beginning of an assistant's message."""
    chat_template_kwargs: dict[str, Any] = Field(default={}, max_length=MAX_TEMPLATE_VARIABLES)
    """Further variables of the template, such as ``enable_thinking``."""

    counterparts: ClassVar = {"prompt": "messages"}
    required: ClassVar = {"messages": EXPECTED_MESSAGES}
    neutral_values = CHAT_NEUTRAL_VALUES
    neutral_types = CHAT_NEUTRAL_TYPES

    @model_validator(mode="after")
    def _check_chat_fields(self) -> ChatRequest:
        limits = (self.max_tokens, self.max_completion_tokens)
        if None not in limits and limits[0] != limits[1]:
            raise field_error(
                "max_tokens", f"must equal max_completion_tokens ({limits[1]}), found {limits[0]}; send one of them"
            )
        if self.top_logprobs is not None and not self.logprobs:
            problem = f"allowed only if logprobs is true, found {self.top_logprobs} with logprobs false"
            raise field_error("top_logprobs", problem)
        if self.tool_choice is not None and not self.tools:
            problem = f"allowed only with tools, found {quote_value(self.tool_choice)} without"
            raise field_error("tool_choice", problem)
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_field(self) -> str | None:
        sent = (name for name in ("max_completion_tokens", "max_tokens") if getattr(self, name) is not None)
        return next(sent, None)

    @property
    def prompt_fields(self) -> list[str]:
        return ["messages"]

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class ChatTopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None
    """UTF-8 bytes of the token's text; null if it has none of its own."""


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(BaseModel):
    """A complete response."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Unix time, seconds."""
    model: str
    choices: list[ChatChoice]
    usage: Usage
    fiftyfold: Extension


class ChatCompletionChunk(BaseModel):
    """One chunk of a stream. Unset fields are omitted."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    fiftyfold: Extension | None = None
    obfuscation: str | None = None
