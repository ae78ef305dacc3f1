"""Request and response of OpenAI's completions API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, PlainValidator, model_validator

from serve.api.schemas.base import Integer, integral, parse_strings, parse_tokens
from serve.api.schemas.generation import MAX_CHOICES, GenerationRequest
from serve.api.schemas.neutral_fields import NEUTRAL_TYPES, NEUTRAL_VALUES
from serve.api.schemas.usage import Extension, Usage
from serve.api.schemas.validation import field_error, wrong, wrong_item

MAX_LOGPROBS = 5


class _PromptList(list[str | list[int]]):
    """Prompts that were sent as a list. Errors name each by its index."""


def _parse_prompt(value: Any) -> list[str | list[int]]:
    """Return one item per prompt; an empty list becomes one empty prompt. The first item of a list tells what the
    others are."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise wrong("a string, a list of strings, a list of token IDs, or a list of lists of token IDs", value)
    first = integral(value[0]) if value else 0
    if type(first) is int:
        return [parse_tokens(value)]
    if isinstance(first, str):
        return _PromptList(parse_strings(value))
    if not isinstance(first, list):
        raise wrong_item(0, "a string, a token ID or a list of token IDs", first)
    for index, item in enumerate(value):
        if not isinstance(item, list):
            raise wrong_item(index, "a list of token IDs", item)
    return _PromptList(parse_tokens(item, f"{index}.") for index, item in enumerate(value))


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``.

    Text prompts are encoded with BOS in front, as training documents are; lists of token IDs are used unchanged. An
    empty prompt starts from BOS. Spellings of special tokens in a prompt are text. Fields of other servers are listed
    in :mod:`serve.api.schemas.neutral_fields`.
    """

    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(_parse_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]] | None),
    ] = Field(default=[[]])
    max_tokens: Annotated[Integer, Field(ge=0)] = 16
    parse_special: bool = False
    """Extension of OpenAI's API. Read spellings of special tokens in text prompts as these tokens; a BOS at the start
    replaces the one in front."""
    echo: bool = False
    """Prepend the prompt to each completion."""
    logprobs: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report this many alternatives per position and the sampled token; with ``echo``, also for the prompt."""
    best_of: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Generate this many completions per prompt and return the ``n`` with the highest mean log-probability per token,
    the best one first."""

    counterparts: ClassVar = {"messages": "prompt", "max_completion_tokens": "max_tokens"}
    neutral_values = NEUTRAL_VALUES
    neutral_types = NEUTRAL_TYPES

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.candidates < self.n:
            raise field_error("best_of", f"must be at least n ({self.n}), found {self.best_of}")
        if self.candidates > self.n and self.stream:
            raise field_error(
                "best_of",
                f"must equal n ({self.n}) if stream is true, found {self.best_of}; the best completions are known only "
                "at the end",
            )
        return self

    @property
    def token_limit(self) -> int:
        return self.max_tokens

    @property
    def limit_field(self) -> str:
        return "max_tokens"

    @property
    def prompt_fields(self) -> list[str]:
        in_list = isinstance(self.prompt, _PromptList)
        return [f"prompt.{index}" for index in range(len(self.prompt))] if in_list else ["prompt"]

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def candidates(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.logprobs is not None


class Logprobs(BaseModel):
    """Parallel lists with one item per token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    """Natural logarithms; None for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []
    """Offset of each token in the choice's text, in characters."""

    @classmethod
    def concatenate(cls, parts: Iterable[Logprobs]) -> Logprobs:
        parts = list(parts)
        return cls(**{name: [item for part in parts for item in getattr(part, name)] for name in cls.model_fields})


class Choice(BaseModel):
    index: int
    """Position in prompt-major order: all completions of the first prompt come first."""
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    """A complete response, or one chunk of a stream. Unset fields are omitted."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix time, seconds."""
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    fiftyfold: Extension | None = None
    obfuscation: str | None = None
    """Random characters, in a chunk of a stream with ``include_obfuscation``."""
