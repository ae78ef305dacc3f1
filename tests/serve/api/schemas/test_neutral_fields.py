"""Fields of other servers at values that change nothing."""

import pytest

from serve.api.schemas.completions import CompletionRequest
from serve.api.schemas.neutral_fields import NEUTRAL_TYPES, NEUTRAL_VALUES
from serve.api.schemas.validation import quote_value

COMMON = {"prompt": "the", "max_tokens": 12, "seed": 3}

OPENAI = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": None,
    "n": 1,
    "presence_penalty": 0.0,
    "stop": None,
    "stream": False,
    "stream_options": None,
    "suffix": None,
    "temperature": 1,
    "top_p": 1,
    "user": "someone",
    "metadata": {},
    "store": False,
    "service_tier": "auto",
}
VLLM = {
    "use_beam_search": False,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "stop_token_ids": [],
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "min_tokens": 0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
    "allowed_token_ids": None,
    "prompt_logprobs": None,
    "add_special_tokens": True,
    "response_format": None,
    "guided_json": None,
    "priority": 0,
    "logits_processors": None,
    "return_tokens_as_token_ids": None,
    "stream_options": {"include_usage": False, "continuous_usage_stats": False},
}
LLAMA_CPP = {
    "cache_prompt": True,
    "dynatemp_range": 0.0,
    "dynatemp_exponent": 1.0,
    "top_k": 0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "dry_multiplier": 0.0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ["\n", ":"],
    "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
    "mirostat": 0,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
    "grammar": "",
    "n_keep": 0,
    "n_probs": 0,
    "min_keep": 0,
    "id_slot": -1,
    "lora": [],
    "logit_bias": [],
    "stop": [],
    "timings_per_token": False,
}
TGI = {
    "best_of": None,
    "decoder_input_details": False,
    "details": False,
    "do_sample": True,
    "frequency_penalty": None,
    "grammar": None,
    "repetition_penalty": None,
    "return_full_text": False,
    "top_n_tokens": None,
    "truncate": None,
    "typical_p": None,
    "watermark": False,
    "adapter_id": None,
}


def complete(client, **body) -> list:
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


@pytest.mark.parametrize("fields", [OPENAI, VLLM, LLAMA_CPP, TGI], ids=["openai", "vllm", "llama.cpp", "tgi"])
def test_the_neutral_settings_of_other_servers_change_nothing(client, fields) -> None:
    assert complete(client, **COMMON, **fields) == complete(client, **COMMON)


def test_null_means_omitted_for_every_field(client) -> None:
    names = [*CompletionRequest.model_fields, *NEUTRAL_VALUES, *NEUTRAL_TYPES, "unheard_of"]
    assert complete(client, **dict.fromkeys(names) | COMMON) == complete(client, **COMMON)
    body = {"prompt": None, "seed": 3, "max_tokens": None}
    assert complete(client, **body) == complete(client, seed=3, max_tokens=16)
    assert client.post("/tokenize", json={"prompt": "a", "model": None, "return_token_strs": None}).status_code == 200
    response = client.post("/tokenize", json={"prompt": None})
    assert (response.status_code, response.json()["error"]["message"]) == (400, "prompt: missing, expected a string")


@pytest.mark.parametrize("name", NEUTRAL_VALUES)
def test_other_values_are_refused_by_name(client, name) -> None:
    for value in (0.5, "some", [3], {"a": 1}, *([] if True in NEUTRAL_VALUES[name] else [True])):
        response = client.post("/v1/completions", json=COMMON | {name: value})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, name), value
        assert error["message"].startswith(f"{name}: not supported by this server")
        assert f", found {quote_value(value)}; omit the field" in error["message"]


@pytest.mark.parametrize("name", NEUTRAL_TYPES)
def test_fields_without_effect_have_a_type(client, name) -> None:
    response = client.post("/v1/completions", json=COMMON | {name: {"a": 1}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("store", 0),
        ("store", True),
        ("skip_special_tokens", False),
        ("add_special_tokens", False),
        ("service_tier", "flex"),
        ("metadata", {"a": "b"}),
        ("repeat_last_n", True),
        ("do_sample", 1),
    ],
)
def test_values_next_to_neutral_ones_are_refused(client, name, value) -> None:
    response = client.post("/v1/completions", json=COMMON | {name: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)


def test_a_bias_of_zero_and_greedy_sampling_change_nothing(client) -> None:
    assert complete(client, **COMMON, logit_bias={"3": 0, "4": 0.0}) == complete(client, **COMMON)
    assert complete(client, **COMMON, temperature=0, do_sample=False) == complete(client, **COMMON, temperature=0)
    assert complete(client, **COMMON, best_of=2, n=2) == complete(client, **COMMON, n=2)


def test_stream_options_have_fields_of_their_own(client) -> None:
    body = COMMON | {"stream": True, "stream_options": {"min_p": 0}}
    error = client.post("/v1/completions", json=body).json()["error"]
    assert error["message"] == "stream_options.min_p: unknown field"
    body["stream_options"] = {"continuous_usage_stats": True}
    error = client.post("/v1/completions", json=body).json()["error"]
    assert error["message"].startswith("stream_options.continuous_usage_stats: not supported")
    for neutral in ({}, {"include_usage": False}, {"include_obfuscation": None}):
        assert complete(client, **COMMON, stream_options=neutral) == complete(client, **COMMON)
