"""A server that listens on loopback in a thread, for the tests of clients."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from serve.api.asgi import create_app
from serve.api.config import HttpConfig
from serve.engine import Engine


class Listening:
    """A server in a thread."""

    def __init__(self, app: ASGIApp, engine: Engine, http: str):
        self.engine = engine
        self._server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=0, http=http, log_level="error", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.address = self._server.servers[0].sockets[0].getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)

    def send(self, request: bytes) -> bytes:
        """Return all bytes that the server sends before it closes the connection."""
        with socket.create_connection(self.address, timeout=120) as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65536), b""))


@contextmanager
def listening(
    engine: Engine, http: str = "auto", config: HttpConfig | None = None, name: str = "letters"
) -> Iterator[Listening]:
    """Serve an engine under a model name."""
    with listening_app(create_app(engine, name, config), engine, http) as server:
        yield server


@contextmanager
def listening_app(app: ASGIApp, engine: Engine, http: str = "auto") -> Iterator[Listening]:
    """Serve an application, whose completions run in ``engine``."""
    server = Listening(app, engine, http)
    try:
        yield server
    finally:
        server.stop()
