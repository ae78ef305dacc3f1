"""What the HTTP interface takes and gives, in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, model_validator

from serve.engine import SamplingParams

MOST_LOGPROBS = 5
MOST_STOP_STRINGS = 16


class RequestBody(BaseModel):
    # Strict: "0.5" is not a number and true is not 1. Unknown fields are refused, because a setting that is silently
    # ignored looks like one that has no effect.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _check_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds an unpaired surrogate, which no UTF-8 text can") from None
    return text


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _parse_prompt(value: Any) -> list[str | list[int]]:
    """One item per prompt. Nothing at all is one empty prompt."""
    if value is None or value == []:
        return [[]]
    if isinstance(value, str) or _is_tokens(value):
        value = [value]
    if not isinstance(value, list) or not (
        all(isinstance(item, str) for item in value) or all(_is_tokens(item) for item in value)
    ):
        raise ValueError("expected a string, a list of strings, a list of token ids, or a list of lists of token ids")
    return [_check_text(item) if isinstance(item, str) else item for item in value]


def _parse_stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("expected a string or a list of strings")
    if len(stops) > MOST_STOP_STRINGS:
        raise ValueError(f"at most {MOST_STOP_STRINGS} stop strings are taken, found {len(stops)}")
    if "" in stops:
        raise ValueError("an empty stop string would stop before the first character")
    return stops


def _only(*accepted: Any) -> AfterValidator:
    """A field of OpenAI's that is not supported here: any value but these, which change nothing, is refused."""

    def check(value: Any) -> Any:
        if value not in accepted:
            raise ValueError("is not supported by this server; leave it out")
        return value

    return AfterValidator(check)


class StreamOptions(RequestBody):
    include_usage: bool = False
    """Send one more chunk at the end, with the token counts."""


class CompletionRequest(RequestBody):
    """``POST /v1/completions``.

    A prompt given as text is encoded with BOS in front, as every document in training begins; a list of token ids is
    used as it is. An empty prompt starts from BOS.
    """

    model: str | None = None
    """None takes the model that is served."""
    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(_parse_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]] | None),
    ] = Field(default=None, validate_default=True)
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0)] | None = 0
    """Not among OpenAI's fields. 0 keeps the whole vocabulary."""
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    """Completions per prompt; with a seed, the i-th uses ``seed + i``."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[str], PlainValidator(_parse_stop, json_schema_input_type=str | list[str] | None)] = Field(
        default=None, validate_default=True
    )
    echo: bool | None = False
    """Begin each completion with its prompt."""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    """Report this many likely tokens at each place, and the token taken; with ``echo`` also over the prompt."""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Taken and not used."""

    best_of: int | None = None
    suffix: Annotated[str | None, _only(None, "")] = None
    frequency_penalty: Annotated[float | None, _only(None, 0)] = None
    presence_penalty: Annotated[float | None, _only(None, 0)] = None
    logit_bias: Annotated[dict[str, float] | None, _only(None, {})] = None

    @model_validator(mode="after")
    def _check_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: is not supported by this server; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed together with stream")
        return self

    def sampling_params(self, choice: int) -> SamplingParams:
        """For the ``choice``-th of the ``n`` completions of a prompt. A null means the default, as at OpenAI."""
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

    prompt: Annotated[str, AfterValidator(_check_text)]
    add_special_tokens: bool = True
    """Put BOS in front."""
    model: str | None = None


class DetokenizeRequest(RequestBody):
    """``POST /detokenize``."""

    tokens: list[int]
    model: str | None = None


class Logprobs(BaseModel):
    """One item per token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    """Natural logarithms; None for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []
    """Characters of the choice's text before the token."""

    @classmethod
    def joined(cls, parts: Iterable[Logprobs]) -> Logprobs:
        """One after another."""
        parts = list(parts)
        return cls(**{name: [item for part in parts for item in getattr(part, name)] for name in cls.model_fields})


class Choice(BaseModel):
    index: int
    """Completions of the first prompt come first."""
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Extension(BaseModel):
    """What OpenAI's shape has no place for."""

    cache_nbytes: int
    """Bytes of the caches that this request's completions were decoded from, counted from their storages."""


class Completion(BaseModel):
    """A whole answer, or one chunk of a stream. Fields that were not set are left out."""

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
    """Tokens of prompt and completion together."""
    cache_bytes_per_token: float
    """Of a full context, counted from the storages."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
