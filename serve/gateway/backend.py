"""Connection between a gateway and the replicas of a model: an ASGI application called through a stream of messages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from starlette.types import ASGIApp, Message

from model.errors import FiftyfoldError

logger = logging.getLogger(__name__)
_SCOPE_KEYS = ("method", "path", "query_string", "headers")
_DROPPED_HEADERS = frozenset(
    {b"authorization", b"content-encoding", b"content-length", b"expect", b"transfer-encoding"}
)
"""Headers that the gateway has acted on: replicas get a complete, decompressed body."""


class ReplicaLostError(FiftyfoldError):
    """A replica ended while it worked on a request."""


class Backend(Protocol):
    """The replicas of one model."""

    def respond(
        self, request: dict[str, Any], body: bytes, prefix: Sequence[bytes] = ()
    ) -> AsyncIterator[list[Message]]:
        """Yield the ASGI messages of the response, in lists of those that are ready together.

        Raises ReplicaLostError if the replica ends before its response does.

        Args:
            request: Method, path, query string and headers, from :func:`describe_request`.
            prefix: Digests of the prompt's beginnings, from :func:`serve.gateway.prefixes.prefix_digests`.
        """
        ...


def describe_request(scope: Any) -> dict[str, Any]:
    """Return the part of an ASGI scope that replicas need. It can be pickled and holds no API key."""
    request = {key: scope[key] for key in _SCOPE_KEYS}
    headers = [(name, value) for name, value in request["headers"] if name.lower() not in _DROPPED_HEADERS]
    return {**request, "headers": headers}


async def call_app(app: ASGIApp, request: dict[str, Any], body: bytes) -> AsyncGenerator[list[Message], None]:
    """Call an ASGI application with a complete body and yield the messages that it sends.

    The start of the response comes together with its first bytes, and the bytes that are ready together as one message:
    every list and every message costs time in three processes.

    Closing the iterator, or cancelling its consumer, tells the application that the client has disconnected.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    disconnected = asyncio.Event()
    bodies = [body]

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        messages.put_nowait(message)

    def end(task: asyncio.Future[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:  # the response, status 500, has been sent
            logger.error("the application failed (%s)", type(error).__name__)
        messages.put_nowait(None)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        "client": None,
        "server": None,
        **request,
    }
    task = asyncio.ensure_future(app(scope, receive, send))
    task.add_done_callback(end)
    try:
        message: Message | None = {}
        batch: list[Message] = []
        while message is not None:
            message = await messages.get()
            if message is not None:
                _append(batch, message)
            if messages.empty() and batch and (message is None or batch[-1]["type"] == "http.response.body"):
                yield batch
                batch = []
    finally:
        disconnected.set()
        task.cancel()


def _append(batch: list[Message], message: Message) -> None:
    """Append a message, or join its body to that of the last one."""
    last = batch[-1] if batch else {}
    if last.get("type") == message["type"] == "http.response.body":
        batch[-1] = {**message, "body": last.get("body", b"") + message.get("body", b"")}
    else:
        batch.append(message)


async def fetch(backend: Backend, path: str) -> tuple[int, bytes]:
    """Send a GET request of the gateway's own. Return the status and body of the response."""
    request = {"method": "GET", "path": path, "query_string": b"", "headers": []}
    status, parts = 500, []
    async with aclosing(backend.respond(request, b"")) as batches:  # type: ignore[type-var]
        async for batch in batches:
            for message in batch:
                status = message.get("status", status)
                parts.append(message.get("body", b""))
    return status, b"".join(parts)
