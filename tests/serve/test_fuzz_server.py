"""Generated requests against a listening gateway: by schema, and as arbitrary bytes. None gets a server error."""

import json
import random
import re
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from listening_server import Listening, listening_app
from replicas import Replicas
from schemathesis import GenerationMode

from serve.api.asgi import create_app
from serve.api.config import HttpConfig
from serve.engine import Engine, EngineConfig
from serve.gateway.asgi import create_gateway

CONFIG = HttpConfig(max_body_bytes=20_000)


@pytest.fixture(scope="module")
def server(endless_model, letters) -> Iterator[Listening]:
    engine = Engine(endless_model, letters, EngineConfig(max_active_requests=4, max_waiting_requests=300))
    replicas = Replicas(create_app(engine, "letters", CONFIG))
    with listening_app(create_gateway({"letters": replicas}, CONFIG, 60), engine) as server:
        yield server


@pytest.fixture(scope="module")
def api_schema(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


FUZZ = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def fuzz_schema(schema, count: int, derandomize: bool) -> Counter[str]:
    """Send valid and invalid requests to every operation; return the number of operations with each kind of answer."""
    answers: Counter[str] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        seen: set[int] = set()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(FUZZ, max_examples=count, derandomize=derandomize)
            @given(operation.as_strategy(generation_mode=mode))
            def run(case) -> None:
                response = case.call(timeout=120)
                assert response.status_code < 500, response.text
                seen.add(response.status_code)  # noqa: B023

            with suppress(Unsatisfiable):  # no invalid request of an operation without parameters
                run()
        answers.update(str(status) for status in seen)
        answers[operation.path] += 1
    return answers


def test_requests_by_schema(api_schema) -> None:
    answers = fuzz_schema(api_schema, 15, derandomize=True)
    assert answers["200"] > 8
    assert answers["400"] >= 4
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/cache"} <= set(answers)


@pytest.mark.long
def test_many_requests_by_schema(api_schema) -> None:
    fuzz_schema(api_schema, 1000, derandomize=False)


BODY = json.dumps({"prompt": "the rain", "max_tokens": 2, "stop": ["x"], "stream": True}).encode()
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    b"Connection: close\r\n\r\n%b"
)
REQUESTS = [
    HEAD % (len(BODY), BODY),
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    b'2d\r\n{"messages":[{"role":"user","content":"the"}]}\r\n0\r\n\r\n',
    b"GET /v1/models HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n",
    b"GET /metrics?model=letters HTTP/1.0\r\n\r\n",
]
PIECES = [
    b"\0",
    b"\xff",
    b"\r\n",
    b"\n\n",
    b":",
    b"{",
    b"]" * 50,
    b"%00",
    b"99999999999999999999",
    b"-1",
    b"\\ud800",
    b"/../",
]


def mutated(chance: random.Random) -> tuple[bytes, bool]:
    """Return a request with bytes replaced, removed, repeated or inserted anywhere, or only in a body of right length,
    and whether it is complete."""
    if chance.random() < 0.5:
        return change(chance, chance.choice(REQUESTS)), False
    body = change(chance, BODY)
    return HEAD % (len(body), body), True


def change(chance: random.Random, data: bytes) -> bytes:
    request = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(request) + 1)
        end = min(len(request), start + chance.choice([0, 1, 1, 2, 8, 40]))
        with_ = chance.choice(
            [b"", bytes([chance.randrange(256)]), chance.choice(PIECES), bytes(request[start:end]) * 2]
        )
        request[start:end] = with_
    return bytes(request)


def send(server: Listening, request: bytes, complete: bool) -> bytes:
    """Send bytes, and no more if they may be incomplete; return all that the server answers."""
    with socket.create_connection(server.address, timeout=120) as connection:
        connection.sendall(request)
        if not complete:  # for the server, a client that leaves
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        return answer


def fuzz_bytes(server: Listening, count: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    statuses = []
    for _ in range(count):
        request, complete = mutated(chance)
        found = re.findall(rb"HTTP/1\.[01] (\d{3})", send(server, request, complete))
        statuses += map(int, found)
        assert not any(status >= b"500" for status in found), request
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    return statuses


def test_arbitrary_bytes(server) -> None:
    statuses = fuzz_bytes(server, 300, seed=0)
    assert statuses.count(200) > 10
    assert statuses.count(400) > 50


@pytest.mark.long
def test_many_arbitrary_bytes(server) -> None:
    fuzz_bytes(server, 20_000, seed=random.randrange(2**32))
