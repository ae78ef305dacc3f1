from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from serve.api.asgi import create_app
from serve.engine import Engine, EngineConfig


@pytest.fixture(scope="module")
def client(endless_model, letters) -> Iterator[TestClient]:
    engine = Engine(
        endless_model, letters, EngineConfig(max_active_requests=4, max_waiting_requests=8, prefill_chunk=32)
    )
    with TestClient(create_app(engine, "letters", max_body_bytes=20_000), raise_server_exceptions=False) as client:
        yield client
