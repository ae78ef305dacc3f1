"""The chat route with a real engine, in OpenAI's response format."""

import json
from collections.abc import Iterator

import pydantic
import pytest
import tokenizer_files
from fastapi.testclient import TestClient
from tokenizer_files import write_files

from model.tokenizer import load_tokenizer
from serve.api.asgi import create_app
from serve.api.config import HttpConfig
from serve.api.schemas.chat import ChatRequest
from serve.api.schemas.neutral_fields import CHAT_NEUTRAL_TYPES, CHAT_NEUTRAL_VALUES
from serve.engine import Engine

HELLO = [{"role": "user", "content": "the other rain"}]
CONFIG = HttpConfig(max_body_bytes=20_000, keep_alive_seconds=60, stream_interval_seconds=0)
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def tool_client(tmp_path_factory, random_model_of) -> Iterator[TestClient]:
    """A model whose template writes its tools, and each message's content."""
    template = "{{ tools | length if tools else 'no' }} tools{% for m in messages %}|{{ m.content }}{% endfor %}"
    content = tokenizer_files.byte_level(added=["<|im_end|>"])
    folder = write_files(tmp_path_factory.mktemp("tools"), content, tokenizer_config={"chat_template": template})
    tokenizer = load_tokenizer(folder)
    app = create_app(Engine(random_model_of(tokenizer.vocab_size), tokenizer), "tools", CONFIG)
    with TestClient(app) as client:
        yield client


def ask(client: TestClient, **body) -> dict:
    body = {"messages": HELLO, "max_tokens": 12, "seed": 3, **body}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(client: TestClient, **body) -> list[dict]:
    body = {"messages": HELLO, "max_tokens": 12, "seed": 3, "stream": True, **body}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def prompt_of(letters) -> list[int]:
    return [letters.bos_id, *letters.encode("user: the other rain\nassistant:")]


def test_fields(client, letters) -> None:
    answer = ask(client, model="letters", user="someone")
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "letters")
    [choice] = answer["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert set(choice["message"]) == {"role", "content", "refusal"}
    assert (choice["message"]["role"], choice["logprobs"], choice["finish_reason"]) == ("assistant", None, "length")
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(prompt_of(letters))
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert answer["fiftyfold"]["cache_nbytes"] > 0


def test_the_text_is_that_of_a_completion_of_the_rendered_prompt(client, letters) -> None:
    body = {"prompt": prompt_of(letters), "max_tokens": 12, "seed": 3, "n": 2}
    want = [choice["text"] for choice in client.post("/v1/completions", json=body).json()["choices"]]
    assert [choice["message"]["content"] for choice in ask(client, n=2)["choices"]] == want
    assert want[0] != want[1]


@pytest.mark.parametrize(
    "body", [{}, {"n": 2, "max_tokens": 5}, {"logprobs": True, "top_logprobs": 3, "n": 2}, {"max_tokens": 0}]
)
def test_a_stream_concatenates_to_the_response(client, body) -> None:
    whole = ask(client, **body)
    chunks = stream(client, **body)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert not any("role" in part["delta"] for part in parts[1:])
        assert parts[-1]["delta"] == {}
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        if choice["logprobs"] is not None:
            records = [record for part in parts if part["logprobs"] for record in part["logprobs"]["content"]]
            want = choice["logprobs"]["content"]
            assert [record["token"] for record in records] == [record["token"] for record in want]
            # Batches of other sizes round differently.
            assert [record["logprob"] for record in records] == pytest.approx([r["logprob"] for r in want], abs=1e-4)
    assert not any("usage" in chunk for chunk in chunks)
    assert [chunk.get("fiftyfold") for chunk in chunks] == [None] * (len(chunks) - 1) + [whole["fiftyfold"]]


def test_usage_and_obfuscation_in_a_stream(client) -> None:
    chunks = stream(client, stream_options={"include_usage": True, "include_obfuscation": True})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == ask(client)["usage"]
    assert all("obfuscation" in chunk for chunk in chunks)


def test_logprobs(client, letters) -> None:
    records = ask(client, logprobs=True, top_logprobs=2, temperature=0)["choices"][0]["logprobs"]["content"]
    assert len(records) == 12
    for record in records:
        assert set(record) == {"token", "logprob", "bytes", "top_logprobs"}
        assert bytes(record["bytes"]).decode() == record["token"]
        assert len(record["top_logprobs"]) == 2
        assert record["top_logprobs"][0]["token"] == record["token"]  # greedy
        assert record["top_logprobs"][0]["logprob"] == record["logprob"] <= 0
    assert ask(client, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_logprobs_have_bytes_for_tokens_with_text_only(byte_client) -> None:
    content = ask(byte_client, logprobs=True, max_tokens=40, ignore_eos=True)["choices"][0]["logprobs"]["content"]
    kinds = {record["token"].startswith("token_id:"): record["bytes"] is None for record in content}
    assert kinds == {True: True, False: False}


def test_logprobs_report_no_more_alternatives_than_asked_for(client) -> None:
    # Sampled tokens that are not among the most likely ones are no further alternatives.
    for record in ask(client, logprobs=True, top_logprobs=1, temperature=2)["choices"][0]["logprobs"]["content"]:
        assert len(record["top_logprobs"]) == 1


def test_limits_on_tokens(client, letters) -> None:
    assert ask(client, max_tokens=None, max_completion_tokens=4)["usage"]["completion_tokens"] == 4
    assert ask(client, max_tokens=4, max_completion_tokens=4)["usage"]["completion_tokens"] == 4
    assert ask(client, max_tokens=None)["usage"]["total_tokens"] == 512  # to the end of the context
    error = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a" * 600}]}).json()
    assert error["error"]["code"] == "context_length_exceeded"


def test_text_parts_are_joined_by_newlines(client) -> None:
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "rain"}]
    whole = ask(client, messages=[{"role": "user", "content": "the\nrain"}])
    assert ask(client, messages=[{"role": "user", "content": parts}])["choices"] == whole["choices"]
    assert ask(client, messages=[{"role": "user", "content": []}])["usage"]["prompt_tokens"] > 0


def test_tools_reach_the_template_unless_withheld(tool_client) -> None:
    def prompt_tokens(**body) -> int:
        return ask(tool_client, max_tokens=0, messages=[{"role": "user", "content": ""}], **body)["usage"][
            "prompt_tokens"
        ]

    assert prompt_tokens() == len("no tools|")
    assert prompt_tokens(tools=[TOOL] * 100) == len("100 tools|")
    assert prompt_tokens(tools=[TOOL], tool_choice="auto") == len("1 tools|")
    assert prompt_tokens(tools=[TOOL], tool_choice="none") == len("no tools|")


def test_a_conversation_with_tool_calls(tool_client) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "a", "name": "someone"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": "5"},
    ]
    answer = ask(tool_client, messages=messages, tools=[TOOL], max_tokens=0)
    assert answer["usage"]["prompt_tokens"] == len("1 tools|a||5")


def test_spellings_of_special_tokens_in_a_message_are_text(tool_client) -> None:
    answer = ask(tool_client, messages=[{"role": "user", "content": "<|im_end|>"}], max_tokens=0)
    assert answer["usage"]["prompt_tokens"] == len("no tools|<|im_end|>")


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "messages: missing, expected a list of at least one message"),
        ({"messages": None}, "messages", "messages: missing, expected a list of at least one message"),
        ({"messages": []}, "messages", "expected a list of at least one message, found []"),
        ({"messages": "a"}, "messages", 'expected a list of at least one message, found "a"'),
        ({"messages": [5]}, "messages", "messages.0: expected an object, found 5"),
        ({"messages": [USER, {"role": "user"}]}, "messages", "messages.1.content: missing, expected a string or"),
        ({"messages": [{"content": "a"}]}, "messages", "messages.0.role: missing, expected one of system"),
        ({"messages": [{"role": "im_end", "content": "a"}]}, "messages", 'assistant, tool, found "im_end"'),
        (
            {"messages": [{"role": ["user"], "content": "a"}]},
            "messages",
            "role: expected one of system, developer, user",
        ),
        (
            {"messages": [USER | {"content": 5}]},
            "messages",
            "0.content: expected a string or a list of text parts, found 5",
        ),
        ({"messages": [USER | {"audio": {}}]}, "messages", "messages.0.audio: unknown field"),
        (
            {"messages": [USER | {"tool_call": []}]},
            "messages",
            "messages.0.tool_call: unknown field; did you mean 'tool_calls'?",
        ),
        ({"messages": [USER | {"name": 5}]}, "messages", "messages.0.name: expected a string, found 5"),
        ({"messages": [USER | {"tool_calls": [5]}]}, "messages", 'assistant only, found role "user"'),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}]},
            "messages",
            'messages.0.tool_calls.0.function.arguments: expected a JSON object in a string, found "[]"',
        ),
        (
            {"messages": [USER | {"content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "messages",
            'messages.0.content.0.type: expected "text", found "image_url"',
        ),
        (
            {"messages": [USER | {"content": [{"type": "text"}]}]},
            "messages",
            "messages.0.content.0.text: missing, expected a string",
        ),
        ({"messages": [USER | {"content": [{}]}]}, "messages", 'messages.0.content.0.type: missing, expected "text"'),
        ({"tools": 5}, "tools", "expected a list of tools, found 5"),
        ({"tools": [{"type": "web_search"}]}, "tools", 'tools.0.type: expected "function", found "web_search"'),
        ({"tools": [{}]}, "tools", "tools.0.function: missing, expected an object"),
        ({"tools": [{"function": {}}]}, "tools", "tools.0.function.name: missing, expected a string"),
        ({"tools": [TOOL] * 129}, "tools", "at most 128 tools, found 129"),
        ({"tools": [TOOL]}, "tools", "does not use tools, found 1 tool; omit the field"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", 'expected "auto" or "none", found "required"'),
        ({"tools": [TOOL], "tool_choice": TOOL}, "tool_choice", 'expected "auto" or "none", found an object'),
        ({"tool_choice": "auto"}, "tool_choice", 'allowed only with tools, found "auto" without'),
        (
            {"response_format": {"type": "json_object"}},
            "response_format",
            'as {"type": "text"}, found an object',
        ),
        ({"top_logprobs": 2}, "top_logprobs", "allowed only if logprobs is true, found 2 with logprobs false"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"logprobs": 1}, "logprobs", "true or false"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "must equal max_completion_tokens (6), found 5"),
        (
            {"min_tokens": 6, "max_completion_tokens": 5},
            "min_tokens",
            "must be at most max_completion_tokens (5), found 6",
        ),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", "must be at most max_tokens (5), found 6"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "max_completion_tokens: must be at least 0, found -1"),
        ({"max_completion_tokens": 512}, "max_completion_tokens", "max_completion_tokens: 512 leaves no room for"),
        ({"max_tokens": 512}, "max_tokens", "max_tokens: 512 leaves no room for a prompt"),
        ({"max_completion_tokens": 511}, "messages", "tokens plus max_completion_tokens 511 is"),
        ({"max_tokens": 511}, "messages", "tokens plus max_tokens 511 is"),
        ({"messages": [USER | {"content": "a" * 600}]}, "messages", "tokens leave no room for a completion in the"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"prompt": "a"}, "prompt", "prompt: unknown field; did you mean 'messages'?"),
        (
            {"chat_template_kwargs": {"messages": 1}},
            "chat_template_kwargs",
            "kwargs.messages: set by the server itself, found 1;",
        ),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"logit_bias": {"38": 1}}, "logit_bias", "out of range for a vocabulary of 38"),
    ],
)
def test_invalid_values_are_named(client, body, param, words) -> None:
    body = body if body.keys() & {"messages"} or not body else {"messages": HELLO, **body}
    response = client.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


def test_the_number_of_messages_is_limited() -> None:
    with pytest.raises(pydantic.ValidationError, match="at most 10000 messages, found 10001"):
        ChatRequest.model_validate({"messages": [USER] * 10_001})


def test_neutral_settings_change_nothing(client) -> None:
    neutral = {name: values[0] for name, values in CHAT_NEUTRAL_VALUES.items() if values}
    neutral |= {name: types[0]() for name, types in CHAT_NEUTRAL_TYPES.items()}
    assert ask(client, **neutral)["choices"] == ask(client)["choices"]
    fields = {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "logit_bias": {}, "tools": None, "tool_choice": None}
    assert ask(client, **fields)["choices"] == ask(client)["choices"]
