"""Request and response schemas of the HTTP API, in OpenAI's format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from serve.api.neutral_fields import NEUTRAL_TYPES, NEUTRAL_VALUES, drop_neutral
from serve.api.validation import field_error
from serve.engine import SamplingParams

MAX_LOGPROBS = 5
MAX_STOP_STRINGS = 16


class RequestBody(BaseModel):
    # Strict: "0.5" is not a number and true is not 1. Unknown fields are errors, because a field that is silently
    # ignored looks like a setting without effect.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    neutral_types: ClassVar[Mapping[str, tuple[type, ...]]] = {}
    """Fields that the server does not have and accepts where they change nothing, as in
    :mod:`serve.api.neutral_fields`."""

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        fields = drop_neutral(value, cls.neutral_values, cls.neutral_types)
        for name in fields:
            if name not in cls.model_fields:
                raise field_error(name, "unknown field")  # pydantic would list all of them
        return fields


def _integral(value: Any) -> Any:
    """Return 16.0 as 16: JSON has one type for both, and some languages always write the point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]


def _parse_token_ids(value: Any) -> Any:
    """Return a list of integers if ``value`` is a list of integral numbers, else ``value``."""
    if not isinstance(value, list) or all(type(item) is int for item in value):
        return value
    return [_integral(item) for item in value]


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _parse_prompt(value: Any) -> list[str | list[int]]:
    """Return one item per prompt; an empty list becomes one empty prompt."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if _is_token_ids(ids := _parse_token_ids(value)):
            return [ids]
        value = [_parse_token_ids(item) for item in value]
        if all(isinstance(item, str) for item in value) or all(_is_token_ids(item) for item in value):
            return value
    raise ValueError("expected a string, a list of strings, a list of token IDs, or a list of lists of token IDs")


def _parse_tokens(value: Any) -> list[int]:
    if not _is_token_ids(ids := _parse_token_ids(value)):
        raise ValueError("expected a list of token IDs")
    return ids


def _parse_stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("expected a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise ValueError(f"expected at most {MAX_STOP_STRINGS} stop strings, found {len(stops)}")
    if "" in stops:
        raise ValueError("an empty stop string is not allowed")
    return stops


class StreamOptions(RequestBody):
    include_usage: bool = False
    """Send a final chunk with the token counts."""
    include_obfuscation: bool = False
    """Add an ``obfuscation`` field of random characters to each chunk, which hides the length of its text."""

    neutral_values = {"continuous_usage_stats": (False,)}


class CompletionRequest(RequestBody):
    """``POST /v1/completions``.

    Text prompts are encoded with BOS in front, as training documents are; lists of token IDs are used unchanged. An
    empty prompt starts from BOS. Spellings of special tokens in a prompt are text. Fields may be null, which means the
    default. Fields of other servers are listed in :mod:`serve.api.neutral_fields`.
    """

    model: str | None = None
    """Name of the served model; may be omitted."""
    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(_parse_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]] | None),
    ] = Field(default=[[]])
    max_tokens: Annotated[Integer, Field(ge=0)] = 16
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[Integer, Field(ge=-1)] = 0
    """Extension of OpenAI's API. 0 and -1 keep the whole vocabulary."""
    n: Annotated[Integer, Field(ge=1, le=128)] = 1
    """Completions per prompt. Completion i (from 0) uses ``seed + i``."""
    seed: Annotated[Integer, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[str], PlainValidator(_parse_stop, json_schema_input_type=str | list[str] | None)] = []
    parse_special: bool = False
    """Extension of OpenAI's API. Read spellings of special tokens in text prompts as these tokens; a BOS at the start
    replaces the one in front."""
    echo: bool = False
    """Prepend the prompt to each completion."""
    logprobs: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report this many alternatives per position and the sampled token; with ``echo``, also for the prompt."""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    best_of: Integer | None = None
    """Accepted if equal to ``n``."""
    do_sample: bool | None = None
    """Accepted if it agrees with ``temperature``: false is the same as a temperature of 0."""

    neutral_values = NEUTRAL_VALUES
    neutral_types = NEUTRAL_TYPES

    @model_validator(mode="after")
    def _check_combinations(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise field_error("best_of", "not supported by this server except as n; omit the field")
        if self.do_sample is False and self.temperature > 0:
            raise field_error("do_sample", "false is not supported by this server; set temperature to 0 instead")
        if self.stream_options.include_usage and not self.stream:
            raise field_error("stream_options", "allowed only if stream is true")
        return self

    def sampling_params(self, choice: int) -> SamplingParams:
        """Return the parameters of completion ``choice`` (from 0) of a prompt."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            seed=None if self.seed is None else _wrap_int64(self.seed + choice),
            stop=tuple(self.stop),
            logprobs=self.logprobs,
            prompt_logprobs=self.echo and self.logprobs is not None,
        )


def _wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


class TokenizeRequest(RequestBody):
    """``POST /tokenize``."""

    prompt: str
    add_special_tokens: bool = True
    """Prepend BOS."""
    parse_special: bool = False
    """Read spellings of special tokens as these tokens."""
    model: str | None = None

    neutral_values = {"return_token_strs": (False,)}


class DetokenizeRequest(RequestBody):
    """``POST /detokenize``."""

    tokens: Annotated[list[int], PlainValidator(_parse_tokens, json_schema_input_type=list[int])]
    model: str | None = None


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


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Extension(BaseModel):
    """Fields that OpenAI's API does not have."""

    cache_nbytes: int
    """Bytes of this request's caches, summed over their storages."""


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


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fiftyfold"
    max_model_len: int
    """Maximum tokens of prompt and completion together."""
    cache_bytes_per_token: float
    """Bytes per token of a full context, summed over the cache's storages."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
