"""Sampling fields that completions and chat completions share."""

import dataclasses

import pytest

from serve.api.schemas.chat import ChatRequest
from serve.api.schemas.completions import CompletionRequest
from serve.engine import SamplingParams

MESSAGES = [{"role": "user", "content": "a"}]
FIELDS = {
    "temperature": 0.5,
    "top_p": 0.6,
    "top_k": 7,
    "min_p": 0.1,
    "min_tokens": 3,
    "repetition_penalty": 1.2,
    "presence_penalty": -0.3,
    "frequency_penalty": 0.4,
    "logit_bias": {"5": -100, "6": 0.5},
    "seed": 11,
    "stop": ["x", "y"],
    "stop_token_ids": [7, 8.0],
    "ignore_eos": True,
}


@pytest.mark.parametrize(
    "body",
    [
        CompletionRequest(prompt="a", logprobs=2, echo=True, **FIELDS),
        ChatRequest(messages=MESSAGES, logprobs=True, top_logprobs=2, **FIELDS),
    ],
    ids=["completion", "chat"],
)
def test_every_field_reaches_the_sampler(body) -> None:
    params = body.sampling_params(2, max_tokens=20)
    want = {
        **FIELDS,
        "logit_bias": {5: -100.0, 6: 0.5},
        "seed": 13,
        "stop": ("x", "y"),
        "stop_token_ids": (7, 8),
        "max_tokens": 20,
        "logprobs": 2,
        "prompt_logprobs": isinstance(body, CompletionRequest),
    }
    assert dataclasses.asdict(params) == want
    assert set(want) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize("schema", [CompletionRequest, ChatRequest])
def test_defaults_are_those_of_the_engine(schema) -> None:
    body = schema() if schema is CompletionRequest else schema(messages=MESSAGES)
    assert body.sampling_params(0, max_tokens=16) == SamplingParams()
    assert body.token_limit == (16 if schema is CompletionRequest else None)


def test_seeds_wrap_around() -> None:
    assert CompletionRequest(seed=2**63 - 1, n=2).sampling_params(1, 16).seed == -(2**63)


def test_ranking_needs_log_probabilities() -> None:
    assert CompletionRequest(best_of=2).sampling_params(0, 16).logprobs == 0
    assert CompletionRequest(best_of=2, n=2).sampling_params(0, 16).logprobs is None
    assert CompletionRequest(best_of=2, logprobs=3).sampling_params(0, 16).logprobs == 3
