"""A gateway in front of applications in this process, some of which lose their replica."""

import asyncio
import gc
import gzip
import json
import logging
from collections.abc import Callable, Iterator

import httpx
import pytest
from fastapi.testclient import TestClient
from replicas import Replicas
from slow_engine import slow_down

from serve.api.asgi import create_app
from serve.api.config import HttpConfig
from serve.engine import Engine
from serve.gateway.asgi import create_gateway
from serve.gateway.backend import ReplicaLostError, call_app, describe_request
from serve.gateway.forward import ATTEMPTS

CONFIG = HttpConfig(keep_alive_seconds=60, max_body_bytes=20_000, stream_interval_seconds=0)


@pytest.fixture(scope="module")
def engines(endless_model, letters, byte_model, byte_tokenizer) -> dict[str, Engine]:
    return {"letters": Engine(endless_model, letters), "raw/bytes": Engine(byte_model, byte_tokenizer)}


@pytest.fixture(scope="module")
def models(engines) -> dict[str, Replicas]:
    return {name: Replicas(create_app(engine, name, CONFIG, "3")) for name, engine in engines.items()}


@pytest.fixture(scope="module")
def client(models) -> Iterator[TestClient]:
    with TestClient(create_gateway(models, CONFIG, 60)) as client:
        yield client


def test_the_model_field_selects_the_model(client, engines, byte_tokenizer) -> None:
    body = {"prompt": "the rain", "max_tokens": 4, "temperature": 0}
    first = client.post("/v1/completions", json=body).json()
    assert first["model"] == "letters"
    assert client.post("/v1/completions", json={**body, "model": "letters"}).json()["choices"] == first["choices"]
    other = client.post("/v1/completions", json={**body, "model": "raw/bytes"}).json()
    assert other["model"] == "raw/bytes" and other["choices"] != first["choices"]
    wrong = client.post("/v1/completions", json={**body, "model": "none"})
    assert wrong.status_code == 404
    assert wrong.json()["error"]["message"] == "model: 'none' is not served here, only 'letters', 'raw/bytes' are"
    for value in ("5", '"\\ud800"'):
        wrong = client.post("/v1/completions", content=b'{"model": %b}' % value.encode())
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "model")


def test_models_are_listed_together(client) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [(card["id"], card["version"]) for card in cards] == [("letters", "3"), ("raw/bytes", "3")]
    assert client.get("/v1/models/raw/bytes").json() == cards[1]
    assert client.get("/v1/models/none").json()["error"]["code"] == "model_not_found"
    assert client.head("/v1/models").content == b""


def test_other_routes_take_the_model_from_the_query(client) -> None:
    assert client.get("/tokenizer_info").json()["vocab_size"] == 38
    assert client.get("/tokenizer_info?model=raw/bytes").json()["vocab_size"] == 258
    assert client.get("/v1/cache", params={"model": "none"}).status_code == 404
    assert "fiftyfold_running" in client.get("/metrics").text
    assert client.get("/nowhere").json()["error"]["message"] == "no route for GET /nowhere"
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"


def test_a_model_without_replicas_does_not_hide_the_others(models) -> None:
    class Gone:
        async def respond(self, request, body, prefix=()):
            raise ReplicaLostError("gone")
            yield []

    with TestClient(create_gateway({"gone": Gone(), **models}, CONFIG, 60)) as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["letters", "raw/bytes"]
        answer = client.get("/v1/models/gone")
        assert answer.status_code == 503 and "model 'gone': the replica ended" in answer.text
    with TestClient(create_gateway({"gone": Gone()}, CONFIG, 60)) as client:
        assert client.get("/v1/models").status_code == 503


def test_health_is_that_of_all_models(client, models, endless_model, letters) -> None:
    report = client.get("/healthz").json()
    assert (report["status"], report["unfinished"]) == ("ok", 0)
    assert [model["model"] for model in report["models"]] == ["letters", "raw/bytes"]
    broken = Engine(endless_model, letters)
    broken._failure = ValueError("x")
    app = create_gateway({**models, "broken": Replicas(create_app(broken, "broken"))}, CONFIG, 60)
    with TestClient(app) as other:
        assert other.get("/healthz").status_code == 503
        assert "model 'broken': the engine failed" in other.get("/health").json()["error"]["message"]


def test_bodies_are_checked_before_a_replica_sees_them(client, models) -> None:
    before = len(models["letters"].requests)
    assert client.post("/v1/completions", json={"prompt": "a" * 30_000}).status_code == 413
    assert client.post("/v1/completions", content=b"x", headers={"content-encoding": "gzip"}).status_code == 400
    assert len(models["letters"].requests) == before
    body = gzip.compress(json.dumps({"prompt": "the", "max_tokens": 1}).encode())
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    assert client.post("/v1/completions", content=body, headers=headers).status_code == 200


def test_replicas_do_not_get_the_key(models, tmp_path) -> None:
    (tmp_path / "key").write_text("correct-horse")
    config = CONFIG.model_copy(update={"api_key_file": str(tmp_path / "key")})
    with TestClient(create_gateway(models, config, 60)) as client:
        assert client.get("/v1/cache").status_code == 401
        assert client.get("/v1/cache", headers={"Authorization": "Bearer correct-horse"}).status_code == 200
    assert "correct-horse" not in repr(models["letters"].requests[-1])


ASK = {"prompt": "the rain", "max_tokens": 12, "temperature": 0}


@pytest.fixture
def lossy(endless_model, letters) -> Callable[..., tuple[TestClient, Replicas]]:
    """Function that returns a gateway and its replicas, with an engine of their own: one stops with its event loop."""

    def lossy(*losses: int) -> tuple[TestClient, Replicas]:
        app = create_app(Engine(endless_model, letters), "letters", CONFIG)
        replicas = Replicas(app, losses)
        return TestClient(create_gateway({"letters": replicas}, CONFIG, 60), raise_server_exceptions=False), replicas

    return lossy


@pytest.mark.parametrize("losses", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_is_sent_again_if_the_client_has_got_nothing(lossy, client, losses, streamed) -> None:
    lost, replicas = lossy(*losses)
    body = ASK | {"stream": streamed}
    with lost:
        answer = lost.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert len(replicas.requests) == len(losses) + 1
    want = client.post("/v1/completions", json=ASK).json()["choices"][0]["text"]
    if streamed:
        events = [event.removeprefix("data: ") for event in answer.text.strip().split("\n\n")]
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    else:
        text = answer.json()["choices"][0]["text"]
    assert text == want


def test_a_started_stream_ends_with_an_error(lossy) -> None:
    lost, replicas = lossy(4)
    with lost:
        events = lost.post("/v1/completions", json=ASK | {"stream": True}).text.strip().split("\n\n")
    assert len(replicas.requests) == 1
    assert events[-1] == "data: [DONE]"
    error = json.loads(events[-2].removeprefix("data: "))["error"]
    assert error["message"] == "the replica ended while it worked on the request; send it again"
    assert 3 + 2 <= len(events) < 12 + 2  # the start of the response is a message, too; one may hold several events


def test_a_request_that_loses_every_replica_gets_a_clear_error(lossy) -> None:
    lost, replicas = lossy(*[0] * ATTEMPTS)
    with lost:
        answer = lost.post("/v1/completions", json=ASK)
        assert answer.status_code == 503
        assert "3 times in a row" in answer.json()["error"]["message"]
        assert len(replicas.requests) == ATTEMPTS
        assert lost.post("/v1/completions", json=ASK).status_code == 200


def test_a_model_without_replicas_times_out(models) -> None:
    class Nobody:
        async def respond(self, request, body, prefix=()):
            await asyncio.sleep(60)
            yield []

    with TestClient(create_gateway({"letters": Nobody()}, CONFIG, 0.05)) as client:
        answer = client.post("/v1/completions", json=ASK)
    assert answer.status_code == 504
    assert "no replica of the model has answered within 0.05 seconds" in answer.json()["error"]["message"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_disconnect_reaches_the_replica(endless_model, letters, streamed) -> None:
    engine = Engine(endless_model, letters)
    slow_down(engine)
    body = json.dumps({"prompt": "the", "max_tokens": 500, "temperature": 0, "stream": streamed}).encode()

    async def main() -> None:
        app = create_gateway({"letters": Replicas(create_app(engine, "letters", CONFIG))}, CONFIG, 60)
        sent = []
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            if incoming:
                return incoming.pop()
            while not engine.unfinished or (streamed and len(sent) < 3):
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        await app(scope, receive, send)
        while engine.unfinished:
            await asyncio.sleep(0.01)
        assert engine._scheduler.stats.decoded_tokens - before < 400

    before = engine._scheduler.stats.decoded_tokens
    asyncio.run(main())


def test_a_draining_gateway_ends_its_requests_and_refuses_new_ones() -> None:
    begun, release = asyncio.Event(), asyncio.Event()

    class Slow:
        async def respond(self, request, body, prefix=()):
            yield [{"type": "http.response.start", "status": 200, "headers": []}]
            begun.set()
            await release.wait()
            yield [{"type": "http.response.body", "body": b"complete"}]

    async def main() -> None:
        app = create_gateway({"slow": Slow()}, CONFIG, 60)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            running = asyncio.ensure_future(client.post("/v1/completions", json=ASK))
            await begun.wait()
            drained = asyncio.ensure_future(app.state.drain())
            await asyncio.sleep(0)
            for path in ("/v1/completions", "/tokenize"):
                refused = await client.post(path, json=ASK)
                assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the server is stopping")
            for path in ("/health", "/healthz"):
                assert (await client.get(path)).status_code == 503
            assert not drained.done()
            release.set()
            assert (await running).text == "complete"
            await drained

    asyncio.run(main())


def test_a_failing_application_is_reported_without_its_data(caplog) -> None:
    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        raise ValueError("secret prompt")

    async def main() -> list[dict]:
        return [message async for batch in call_app(app, {}, b"") for message in batch]

    with caplog.at_level(logging.DEBUG):
        assert [message["status"] for message in asyncio.run(main())] == [500]
    assert "ValueError" in caplog.text and "secret" not in caplog.text


def test_the_start_of_a_response_and_bytes_that_are_ready_together_are_one_list() -> None:
    resume = asyncio.Event()

    def part(body: bytes, more: bool = True) -> dict:
        return {"type": "http.response.body", "body": body, "more_body": more}

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.01)
        await send(part(b"a"))
        await send(part(b"b"))
        await resume.wait()
        await send(part(b"c"))
        await send(part(b"", more=False))

    async def main() -> None:
        batches = call_app(app, {}, b"")
        assert await anext(batches) == [{"type": "http.response.start", "status": 200, "headers": []}, part(b"ab")]
        resume.set()
        assert [batch async for batch in batches] == [[part(b"c", more=False)]]

    asyncio.run(main())


def test_a_failure_that_no_consumer_waits_for_is_reported_without_its_data(caplog) -> None:
    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        raise ValueError("secret prompt")

    async def main() -> None:
        batches = call_app(app, {}, b"")
        await anext(batches)
        await batches.aclose()

    with caplog.at_level(logging.DEBUG):
        asyncio.run(main())
        gc.collect()  # asyncio logs exceptions that nobody has retrieved
    assert "ValueError" in caplog.text and "secret" not in caplog.text


def test_headers_that_describe_the_body_stay_behind() -> None:
    headers = [(b"Content-Length", b"5"), (b"accept", b"*/*"), (b"authorization", b"Bearer k"), (b"Expect", b"x")]
    scope = {"method": "GET", "path": "/", "query_string": b"", "headers": headers, "app": object()}
    assert describe_request(scope)["headers"] == [(b"accept", b"*/*")]
    assert "app" not in describe_request(scope)
