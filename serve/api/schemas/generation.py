"""Fields that requests for completions and for chat completions share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator, model_validator

from model.tokenizer import Tokenizer
from serve.api.schemas.base import MAX_INTEGER, Integer, ModelName, RequestBody, parse_strings, parse_tokens
from serve.api.schemas.validation import field_error, wrong, wrong_item
from serve.engine import RequestError, SamplingParams

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 4096
MAX_STOP_TOKEN_IDS = 1024
MAX_BIASES = 1024
MAX_BIAS = 100.0


def _parse_stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise wrong("a string or a list of strings", value)
    if len(stops) > MAX_STOP_STRINGS:
        raise ValueError(f"expected at most {MAX_STOP_STRINGS} stop strings, found {len(stops)}")
    for index, stop in enumerate(parse_strings(stops)):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            problem = f"expected 1 to {MAX_STOP_CHARS} characters, found {len(stop)}"
            raise ValueError(problem) if isinstance(value, str) else field_error(str(index), problem)
    return stops


def _parse_stop_token_ids(value: Any) -> list[int]:
    ids = parse_tokens(value)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise ValueError(f"expected at most {MAX_STOP_TOKEN_IDS} token IDs, found {len(ids)}")
    return ids


def _parse_logit_bias(value: Any) -> dict[int, float]:
    """Return biases by token ID. An empty list is the same as an empty object."""
    if value == []:
        return {}
    if not isinstance(value, dict):
        raise wrong('an object of biases by token ID, such as {"42": -100}', value)
    if len(value) > MAX_BIASES:
        raise ValueError(f"expected at most {MAX_BIASES} token IDs, found {len(value)}")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 12 and str(int(key)) == key):
            raise wrong("token IDs as keys", key)
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:  # also false for NaN
            raise wrong_item(key, f"a number from {-MAX_BIAS:g} to {MAX_BIAS:g}", bias)
        biases[int(key)] = float(bias)
    return biases


class StreamOptions(RequestBody):
    include_usage: bool = False
    """Send a final chunk with the token counts."""
    include_obfuscation: bool = False
    """Add an ``obfuscation`` field of random characters to each chunk, which hides the length of its text."""

    neutral_values: ClassVar = {"continuous_usage_stats": (False,)}


class GenerationRequest(RequestBody):
    """Sampling and streaming fields, with the names of OpenAI's and vLLM's APIs. Null means the default."""

    model: ModelName | None = None
    """Name of a served model; the default one if omitted."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[Integer, Field(ge=-1, le=MAX_INTEGER)] = 0
    """0 and -1 keep the whole vocabulary."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    min_tokens: Annotated[Integer, Field(ge=0, le=MAX_INTEGER)] = 0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[int, float], PlainValidator(_parse_logit_bias, json_schema_input_type=dict[str, float] | None)
    ] = Field(default={})
    n: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] = 1
    """Completions per prompt. Completion i (from 0) uses ``seed + i``."""
    seed: Annotated[Integer, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[list[str], PlainValidator(_parse_stop, json_schema_input_type=str | list[str] | None)] = Field(
        default=[]
    )
    stop_token_ids: Annotated[
        list[int], PlainValidator(_parse_stop_token_ids, json_schema_input_type=list[int] | None)
    ] = Field(default=[])
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    do_sample: bool | None = None
    """Accepted if it agrees with ``temperature``: false is the same as a temperature of 0."""

    @property
    @abstractmethod
    def token_limit(self) -> int | None:
        """Most tokens to generate; None: as many as fit."""

    @property
    @abstractmethod
    def limit_field(self) -> str | None:
        """Name of the field that sets :attr:`token_limit`; None if the client sent none."""

    @property
    @abstractmethod
    def prompt_fields(self) -> list[str]:
        """Dotted names of the prompts, in order."""

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """Alternatives to report per token; None reports no log-probabilities."""

    @property
    def candidates(self) -> int:
        """Completions to generate per prompt, of which the ``n`` best are returned."""
        return self.n

    @property
    def scores_prompt(self) -> bool:
        """True if the prompt's log-probabilities are reported."""
        return False

    @model_validator(mode="after")
    def _check_shared_fields(self) -> GenerationRequest:
        if self.do_sample is False and self.temperature > 0:
            raise field_error(
                "do_sample", f"must be true unless temperature is 0, found false with temperature {self.temperature:g}"
            )
        for name, is_set in self.stream_options:
            if is_set and not self.stream:
                problem = "allowed only if stream is true, found true with stream false"
                raise field_error(("stream_options", name), problem)
        if self.token_limit is not None and self.min_tokens > self.token_limit:
            raise field_error(
                "min_tokens", f"must be at most {self.limit_field} ({self.token_limit}), found {self.min_tokens}"
            )
        return self

    def check_token_ids(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Raise RequestError for token IDs outside the vocabulary, and for stop tokens that leave no token to
        sample."""
        for name in ("logit_bias", "stop_token_ids"):
            for index, token in enumerate(getattr(self, name)):
                if not 0 <= token < vocab_size:
                    item = index if name == "stop_token_ids" else token
                    problem = f"token ID {token} is out of range for a vocabulary of {vocab_size}"
                    raise RequestError.about(f"{name}.{item}", problem)
        stops = set(self.stop_token_ids) | (set() if self.ignore_eos else tokenizer.stop_ids)
        if self.min_tokens and len(stops) >= vocab_size:
            raise RequestError.about(
                "stop_token_ids",
                f"with min_tokens {self.min_tokens}, a token must remain that does not end the completion, found "
                f"{len(stops)} of {vocab_size} that end it",
            )

    def sampling_params(self, choice: int, max_tokens: int) -> SamplingParams:
        """Return the parameters of completion ``choice`` (from 0) of a prompt."""
        logprobs = self.alternatives
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(self.min_tokens, max_tokens),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            seed=None if self.seed is None else _wrap_int64(self.seed + choice),
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=0 if logprobs is None and self.candidates > self.n else logprobs,
            prompt_logprobs=self.scores_prompt,
        )


def _wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
