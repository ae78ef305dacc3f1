"""Parsing of request bodies."""

import json

import pytest

JSON = {"content-type": "application/json"}


def post(client, content: bytes, headers=JSON, route="/v1/completions"):
    return client.post(route, content=content, headers=headers)


@pytest.mark.parametrize(
    ("content", "param", "words"),
    [
        (b'{"prompt": "a",', None, "not valid JSON"),
        (b'{"prompt": "def', None, "not valid JSON: Unterminated string starting at character 11"),
        (b"", None, "the body is empty"),
        (b" \n", None, "the body is empty"),
        (b"null", None, "must be a JSON object"),
        (b'"the"', None, "must be a JSON object"),
        (b'[{"prompt": "a"}]', None, "must be a JSON object"),
        (b'{"prompt": "\xff"}', None, "not valid UTF-8 (invalid start byte at byte 12)"),
        ('{"prompt": "a"}'.encode("utf-16"), None, "not valid UTF-8"),
        (b'{"prompt": "a"} {}', None, "not valid JSON"),
        (b"[" * 19_000, None, "nested too deeply"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", None, "too many digits"),
        (b'{"n": 1, "stop": "a", "n": 2}', "n", "n: the field must occur once, found 2 times"),
        (b'{"stream_options": {"include_usage": true, "include_usage": false}}', "include_usage", "found 2 times"),
        (b'{"temperature": NaN}', "temperature", "temperature: expected a finite number"),
        (b'{"temperature": Infinity}', "temperature", "finite number"),
        (b'{"temperature": 1e999}', "temperature", "finite number"),
        (b'{"max_tokens": NaN}', "max_tokens", "whole number"),
        (b'{"prompt": [NaN]}', "prompt", "expected a string"),
        (b'{"min_p": NaN}', "min_p", "finite number"),
    ],
)
def test_malformed_bodies_are_refused_in_one_sentence(client, content, param, words) -> None:
    response = post(client, content)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert words in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "\ud800"),
        ("prompt", "a\udfff"),
        ("prompt", ["a", "\ud800"]),
        ("stop", ["\ud800"]),
        ("user", "\ud800"),
        ("suffix", "\ud800"),
        ("\ud800", 1),
        ("metadata", {"\ud800": 1}),
        ("logit_bias", [{"a": ["\ud800"]}]),
    ],
)
def test_an_unpaired_surrogate_is_refused_by_the_name_of_its_field(client, field, value) -> None:
    response = post(client, json.dumps({"prompt": "a"} | {field: value}).encode())
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert "unpaired surrogate" in error["message"]
    assert error["param"] == field.replace("\ud800", r"\ud800")


@pytest.mark.parametrize("route", ["/v1/completions", "/tokenize", "/detokenize"])
def test_all_routes_parse_bodies_in_the_same_way(client, route) -> None:
    response = post(client, b'{"model": "\\ud800"}', route=route)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
    assert post(client, b'{"a":' * 3000 + b"1" + b"}" * 3000, route=route).status_code == 400
    assert post(client, b"", route=route).json()["error"]["message"] == "the body is empty; send a JSON object"


def test_valid_bodies(byte_client) -> None:
    def text(content: bytes, headers=JSON) -> str:
        response = post(byte_client, content, headers)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    body = {"prompt": "é😀\0", "max_tokens": 3, "temperature": 0, "echo": True}
    content = json.dumps(body, ensure_ascii=False).encode()
    plain = text(content)
    assert plain.startswith("é😀\0")
    assert text(b"\xef\xbb\xbf" + content) == plain  # a byte order mark, as PowerShell writes it
    assert text(json.dumps(body).encode()) == plain  # a pair of surrogate escapes is one character
    for declared in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        assert text(content, {"content-type": declared}) == plain
    assert text(content, {}) == plain


@pytest.mark.parametrize("declared", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "json"])
def test_other_content_types_are_refused(client, declared) -> None:
    response = post(client, b'{"prompt": "a"}', {"content-type": declared})
    assert response.status_code == 415
    assert f"Content-Type: application/json; found '{declared}'" in response.json()["error"]["message"]


def test_a_web_page_must_declare_json(client) -> None:
    """Browsers send a body without Content-Type to any server without asking it first."""
    assert post(client, b'{"prompt": "a"}', {"origin": "http://evil.example"}).status_code == 415
    assert post(client, b'{"prompt": "a"}', JSON | {"origin": "http://evil.example"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "plain"),
    [
        (
            {"max_tokens": 4.0, "n": 2.0, "seed": 3.0, "top_k": 5.0, "logprobs": 1.0},
            {"n": 2, "top_k": 5, "logprobs": 1},
        ),
        ({"prompt": [1.0, 5.0]}, {"prompt": [1, 5]}),
        ({"prompt": [[1, 5.0], [3.0]]}, {"prompt": [[1, 5], [3]]}),
        ({"temperature": 1, "top_p": 1}, {}),
    ],
)
def test_numbers_may_be_written_with_or_without_a_point(client, body, plain) -> None:
    common = {"max_tokens": 4, "seed": 3}
    answers = [client.post("/v1/completions", json=common | fields).json() for fields in (body, plain)]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_detokenize_accepts_integral_floats(client) -> None:
    assert client.post("/detokenize", json={"tokens": [5.0, 6]}).json() == {"prompt": "de"}
    assert client.post("/detokenize", json={"tokens": [5.5]}).status_code == 400
