"""Paths, methods, cross-origin requests and compressed bodies."""

import asyncio
import gzip
import json
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from serve.api.asgi import create_app
from serve.api.config import HttpConfig
from serve.engine import Engine

GET_ROUTES = ["/v1/models", "/v1/models/letters", "/healthz", "/tokenizer_info", "/openapi.json"]
POST_ROUTES = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2, "temperature": 0},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}
HOST = "http://testserver"
PAGE = "http://localhost:3000"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


def without_id(answer: dict) -> dict:
    return {key: value for key, value in answer.items() if key not in ("id", "created")}


@pytest.mark.parametrize("route", GET_ROUTES)
def test_slashes_do_not_matter_and_head_equals_get(client, route) -> None:
    answer = client.get(route)
    assert answer.status_code == 200
    for same in (f"{route}/", f"{route}//", f"{HOST}/{route}", f"{route}?api-version=1"):
        again = client.get(same, follow_redirects=False)
        assert (again.status_code, again.json()) == (200, answer.json()), same
    for path in (route, f"{route}/"):
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == answer.headers["content-length"]
        assert head.headers["content-type"] == answer.headers["content-type"]


@pytest.mark.parametrize("route", POST_ROUTES)
def test_slashes_do_not_matter_to_post(client, route) -> None:
    answer = client.post(route, json=POST_ROUTES[route])
    assert answer.status_code == 200
    for same in (f"{route}/", f"{HOST}/{route}", route.replace("/v1/", "/v1//")):
        again = client.post(same, json=POST_ROUTES[route], follow_redirects=False)
        assert without_id(again.json()) == without_id(answer.json())


@pytest.mark.parametrize(
    ("method", "route", "allow"),
    [
        ("GET", "/v1/completions", "OPTIONS, POST"),
        ("HEAD", "/v1/completions", "OPTIONS, POST"),
        ("DELETE", "/v1/completions/", "OPTIONS, POST"),
        ("post", "/v1/completions", "OPTIONS, POST"),  # methods are case-sensitive
        ("GET", "/tokenize", "OPTIONS, POST"),
        ("POST", "/v1/models", "GET, HEAD, OPTIONS"),
        ("PUT", "/healthz", "GET, HEAD, OPTIONS"),
        ("PATCH", "/openapi.json", "GET, HEAD, OPTIONS"),
        ("TRACE", "/tokenizer_info", "GET, HEAD, OPTIONS"),
    ],
)
def test_a_wrong_method_names_the_right_ones(client, method, route, allow) -> None:
    scope = {"type": "http", "method": method, "path": route, "headers": [], "query_string": b""}
    status, headers, body = request(client.app, scope)
    assert (status, headers[b"allow"].decode()) == (405, allow)
    if method != "HEAD":
        error = json.loads(body)["error"]
        assert error["message"] == f"{route.rstrip('/')} does not accept {method}, only {allow}"
        assert error["type"] == "invalid_request_error"


def request(app, scope: dict) -> tuple[int, dict, bytes]:
    """Return the answer to a request without a body, past the HTTP client's own checks."""
    sent = []

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize("route", ["/v2", "/v1", "/v1/chat", "/v1/completions/x", "/V1/models"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_unknown_routes(client, route, method) -> None:
    response = client.request(method, route)
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["message"] == f"no route for {method} {route}"
    assert set(error) == {"message", "type", "param", "code"}
    assert client.head(route).status_code == 404


@pytest.mark.parametrize("route", [*GET_ROUTES, *POST_ROUTES])
def test_options_name_the_methods_and_no_origin_is_allowed_by_default(client, route) -> None:
    for headers in ({}, PREFLIGHT):
        response = client.options(route, headers=headers)
        assert (response.status_code, response.content) == (204, b"")
        assert response.headers["allow"] == ("OPTIONS, POST" if route in POST_ROUTES else "GET, HEAD, OPTIONS")
        assert not [name for name in response.headers if name.startswith("access-control")]
    assert "access-control-allow-origin" not in client.get("/v1/models", headers={"origin": PAGE}).headers


@pytest.fixture(scope="module", params=[PAGE, "*"])
def web_client(request, endless_model, letters) -> Iterator[TestClient]:
    config = HttpConfig(allowed_origins=("http://other", request.param), max_body_bytes=20_000)
    with TestClient(create_app(Engine(endless_model, letters), "letters", config)) as client:
        client.allowed = request.param
        yield client


def test_allowed_origins_may_call(web_client) -> None:
    response = web_client.options("/v1/completions", headers=PREFLIGHT)
    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == web_client.allowed
    assert "POST" in response.headers["access-control-allow-methods"].split(", ")
    assert response.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
    assert "Origin" in response.headers["vary"]
    private = web_client.options("/v1/models", headers=PREFLIGHT | {"access-control-request-private-network": "true"})
    assert private.headers["access-control-allow-private-network"] == "true"
    # A page sees errors only if they carry the header, too.
    body = {"prompt": "a", "max_tokens": 2}
    answers = [
        web_client.get("/v1/models", headers={"origin": PAGE}),
        web_client.post("/v1/completions", json=body, headers={"origin": PAGE}),
        web_client.post("/v1/completions", json=body | {"stream": True}, headers={"origin": PAGE}),
        web_client.post("/v1/completions", json={"n": 0}, headers={"origin": PAGE}),
        web_client.post("/v1/completions", json={"prompt": "a" * 30_000}, headers={"origin": PAGE}),
        web_client.get("/nothing", headers={"origin": PAGE}),
        web_client.get("/v1/completions", headers={"origin": PAGE}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 400, 413, 404, 405]
    assert {answer.headers["access-control-allow-origin"] for answer in answers} == {web_client.allowed}
    assert "access-control-allow-origin" not in web_client.get("/v1/models").headers


def test_other_origins_may_not_call(web_client) -> None:
    for origin in ("http://localhost:3001", "null", f"{PAGE}.evil.example"):
        for response in (
            web_client.options("/v1/completions", headers=PREFLIGHT | {"origin": origin}),
            web_client.get("/v1/models", headers={"origin": origin}),
        ):
            assert ("access-control-allow-origin" in response.headers) == (web_client.allowed == "*")
            assert response.headers["vary"] == "Origin"


@pytest.mark.parametrize("origin", ["localhost", "http://localhost:3000/", "http://*.example", "null", ""])
def test_an_invalid_origin_is_a_config_error(origin) -> None:
    with pytest.raises(ValueError, match="expected an origin such as http://localhost:3000"):
        HttpConfig(allowed_origins=(origin,))


def test_a_single_origin_needs_no_list() -> None:
    assert HttpConfig(allowed_origins=PAGE) == HttpConfig(allowed_origins=[PAGE])


def post_compressed(client, content: bytes, encoding: str = "gzip"):
    headers = {"content-type": "application/json", "content-encoding": encoding}
    return client.post("/v1/completions", content=content, headers=headers)


def test_gzip_bodies(client) -> None:
    body = json.dumps({"prompt": "the", "max_tokens": 3, "temperature": 0}).encode()
    plain = client.post("/v1/completions", content=body, headers={"content-type": "application/json"}).json()
    for encoding, content in (("gzip", gzip.compress(body)), ("GZIP", gzip.compress(body)), ("identity", body)):
        answer = post_compressed(client, content, encoding)
        assert without_id(answer.json()) == without_id(plain)

    def pieces() -> Iterator[bytes]:
        for byte in gzip.compress(body):
            yield bytes([byte])

    assert without_id(post_compressed(client, pieces()).json()) == without_id(plain)


@pytest.mark.parametrize(
    ("content", "encoding", "status", "words"),
    [
        (gzip.compress(b" " * 20_001), "gzip", 413, "larger than the limit of 20000 bytes (max_body_bytes)"),
        (gzip.compress(bytes(10_000_000)), "gzip", 413, "larger than the limit"),
        (b"{}", "gzip", 400, "not valid gzip data"),
        (gzip.compress(b"{}")[:-9], "gzip", 400, "it is incomplete"),
        (gzip.compress(b"{}") * 2, "gzip", 400, "data follows its end"),
        (b"", "gzip", 400, "gzip"),
        (b"{}", "br", 415, "Content-Encoding: 'br' is not supported"),
        (b"{}", "gzip, gzip", 415, "is not supported"),
    ],
    ids=["long", "bomb", "plain", "truncated", "followed", "empty", "br", "twice"],  # compressed bytes hold the time
)
def test_bodies_that_cannot_be_decompressed(client, content, encoding, status, words) -> None:
    response = post_compressed(client, content, encoding)
    assert response.status_code == status, response.text
    assert words in response.json()["error"]["message"]
    if status == 415:
        assert response.headers["accept-encoding"] == "gzip, identity"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer none"},
        {"accept": "text/event-stream"},
        {"accept": "text/html;q=0.9"},
        {"accept-encoding": "br"},
        {"x-long": "x" * 50_000},
        {"openai-organization": "org", "x-stainless-retry-count": "0", "user-agent": "x"},
    ],
)
def test_headers_of_clients_are_ignored(client, headers) -> None:
    body = {"prompt": "a", "max_tokens": 2, "temperature": 0}
    answer = client.post("/v1/completions?timeout=5&x", json=body, headers=headers)
    assert answer.headers["content-type"] == "application/json"
    assert without_id(answer.json()) == without_id(client.post("/v1/completions", json=body).json())
