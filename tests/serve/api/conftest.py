import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve.api.asgi import create_app
from serve.api.config import HttpConfig
from serve.engine import Engine, EngineConfig

# A busy machine must not add comments to the streams that tests read.
CONFIG = HttpConfig(max_body_bytes=20_000, keep_alive_seconds=60, stream_interval_seconds=0)


@pytest.fixture(scope="module")
def client(endless_model, letters) -> Iterator[TestClient]:
    engine = Engine(
        endless_model, letters, EngineConfig(max_active_requests=4, max_waiting_requests=8, prefill_chunk=32)
    )
    with TestClient(create_app(engine, "letters", CONFIG), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def byte_client(byte_model, byte_tokenizer) -> Iterator[TestClient]:
    with TestClient(create_app(Engine(byte_model, byte_tokenizer), "bytes", CONFIG)) as client:
        yield client


@pytest.fixture
def lengths_on_event_loop(letters, monkeypatch) -> list[int]:
    """Lengths of the texts and token lists that the tokenizer of ``client`` has processed on the event loop so far."""
    lengths: list[int] = []

    def watch(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(content: Any, *options: Any, **more: Any) -> Any:
            with suppress(RuntimeError):
                asyncio.get_running_loop()
                lengths.append(len(content))
            return method(content, *options, **more)

        return call

    for name in ("encode", "decode"):
        monkeypatch.setattr(letters, name, watch(getattr(letters, name)))
    return lengths
