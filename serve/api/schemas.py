"""Request and response schemas of the HTTP API, in OpenAI's format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, model_validator

from serve.engine import SamplingParams

MAX_LOGPROBS = 5
MAX_STOP_STRINGS = 16


class RequestBody(BaseModel):
    # Strict: "0.5" is not a number and true is not 1. Unknown fields are errors, because a field that is silently
    # ignored looks like a setting without effect.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _check_utf8(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("contains an unpaired surrogate, which UTF-8 cannot encode") from None
    return text


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _parse_prompt(value: Any) -> list[str | list[int]]:
    """Return one item per prompt; None and an empty list become one empty prompt."""
    if value is None or value == []:
        return [[]]
    if isinstance(value, str) or _is_token_ids(value):
        value = [value]
    if not isinstance(value, list) or not (
        all(isinstance(item, str) for item in value) or all(_is_token_ids(item) for item in value)
    ):
        raise ValueError("expected a string, a list of strings, a list of token IDs, or a list of lists of token IDs")
    return [_check_utf8(item) if isinstance(item, str) else item for item in value]


def _parse_stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("expected a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise ValueError(f"expected at most {MAX_STOP_STRINGS} stop strings, found {len(stops)}")
    if "" in stops:
        raise ValueError("an empty stop string is not allowed")
    return stops


def _unsupported_except(*accepted: Any) -> AfterValidator:
    """Reject an unsupported OpenAI field unless its value is one of ``accepted``, which have no effect."""

    def check(value: Any) -> Any:
        if value not in accepted:
            raise ValueError("not supported by this server; omit the field")
        return value

    return AfterValidator(check)


class StreamOptions(RequestBody):
    include_usage: bool = False
    """Send a final chunk with the token counts."""


class CompletionRequest(RequestBody):
    """``POST /v1/completions``.

    Text prompts are encoded with BOS in front, as training documents are; lists of token IDs are used unchanged. An
    empty prompt starts from BOS. Spellings of special tokens in a prompt are text.
    """

    model: str | None = None
    """Name of the served model; may be omitted."""
    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(_parse_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]] | None),
    ] = Field(default=None, validate_default=True)
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0)] | None = 0
    """Extension of OpenAI's API. 0 keeps the whole vocabulary."""
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    """Completions per prompt. Completion i (from 0) uses ``seed + i``."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[str], PlainValidator(_parse_stop, json_schema_input_type=str | list[str] | None)] = Field(
        default=None, validate_default=True
    )
    parse_special: bool | None = False
    """Extension of OpenAI's API. Read spellings of special tokens in text prompts as these tokens; a BOS at the start
    replaces the one in front."""
    echo: bool | None = False
    """Prepend the prompt to each completion."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report this many alternatives per position and the sampled token; with ``echo``, also for the prompt."""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted and ignored."""

    best_of: int | None = None
    suffix: Annotated[str | None, _unsupported_except(None, "")] = None
    frequency_penalty: Annotated[float | None, _unsupported_except(None, 0)] = None
    presence_penalty: Annotated[float | None, _unsupported_except(None, 0)] = None
    logit_bias: Annotated[dict[str, float] | None, _unsupported_except(None, {})] = None

    @model_validator(mode="after")
    def _check_combinations(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: not supported by this server; omit the field")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: allowed only if stream is true")
        return self

    def sampling_params(self, choice: int) -> SamplingParams:
        """Return the parameters of completion ``choice`` (from 0) of a prompt. Null means the default."""
        return SamplingParams(
            max_tokens=16 if self.max_tokens is None else self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=None if self.seed is None else _wrap_int64(self.seed + choice),
            stop=tuple(self.stop),
            logprobs=self.logprobs,
            prompt_logprobs=bool(self.echo) and self.logprobs is not None,
        )


def _wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


class TokenizeRequest(RequestBody):
    """``POST /tokenize``."""

    prompt: Annotated[str, AfterValidator(_check_utf8)]
    add_special_tokens: bool = True
    """Prepend BOS."""
    parse_special: bool = False
    """Read spellings of special tokens as these tokens."""
    model: str | None = None


class DetokenizeRequest(RequestBody):
    """``POST /detokenize``."""

    tokens: list[int]
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
