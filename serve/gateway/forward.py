"""Forwarding of requests to the replicas of the model that they name."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from serve.api.disconnect import run_unless_disconnected
from serve.api.errors import ModelNotFoundError, UnavailableError, error_response
from serve.api.event_stream import DONE, format_event
from serve.engine import RequestTimeoutError
from serve.gateway.backend import Backend, ReplicaLostError, describe_request
from serve.gateway.prefixes import RoutingInfo, parse_routing

ATTEMPTS = 3
"""Replicas to which the gateway sends a request in turn if they end while they work on it."""
STOPPING = "the server is stopping"
_SURROGATE = re.compile("[\ud800-\udfff]")
_LARGE_BODY = 1 << 16
"""Bytes from which a body is parsed in a thread, so that other streams go on."""


class Forwarder:
    """ASGI application that forwards every request to a replica of the model that it names, or of the first model.

    ``model`` is a field of a JSON body, or a parameter of the query of other requests. A request whose replica ends
    is sent to another one as long as nothing has been sent to the client. Otherwise an event stream ends with an
    error, and the connection of any other response breaks.
    """

    def __init__(self, models: Mapping[str, Backend], timeout_seconds: float):
        self._models = models
        self._timeout_seconds = timeout_seconds
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        """True if further requests are refused."""

    async def drain(self) -> None:
        """Refuse further requests, and return when the running ones have ended."""
        self.draining = True
        await self._idle.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await WebSocketClose()(scope, receive, send)
        if self.draining:
            raise UnavailableError(STOPPING)
        self._running += 1
        self._idle.clear()
        try:
            await self._respond(scope, receive, send)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = await request.body()
        if scope["method"] == "POST":
            large = len(body) >= _LARGE_BODY
            info = await asyncio.to_thread(parse_routing, body) if large else parse_routing(body)
        else:
            info = RoutingInfo(parse_qs(scope["query_string"].decode("latin-1")).get("model", [None])[-1])
        backend = self.find(info.model)
        await run_unless_disconnected(request, self._forward(backend, scope, body, info.prefix, send))

    def find(self, name: object) -> Backend:
        """Return the replicas of a model. Raises ModelNotFoundError.

        None selects the first model. So does a value that cannot be a name; the replica then reports the error.
        """
        if not isinstance(name, str) or _SURROGATE.search(name):
            return next(iter(self._models.values()))
        if name not in self._models:
            raise ModelNotFoundError(name, self._models)
        return self._models[name]

    async def _forward(self, backend: Backend, scope: Scope, body: bytes, prefix: Sequence[bytes], send: Send) -> None:
        for _ in range(ATTEMPTS):
            response = _Response(send)
            try:
                async with asyncio.timeout(self._timeout_seconds) as limit:
                    batches = backend.respond(describe_request(scope), body, prefix)
                    async with aclosing(batches) as opened:  # type: ignore[type-var]
                        async for batch in opened:
                            limit.reschedule(None)
                            for message in batch:
                                await response.send(message)
                return
            except TimeoutError:
                raise RequestTimeoutError(
                    f"no replica of the model has answered within {self._timeout_seconds:g} seconds"
                ) from None
            except ReplicaLostError:
                if response.begun:
                    return await response.fail()
        raise UnavailableError(f"the replica ended while it worked on the request, {ATTEMPTS} times in a row")


class _Response:
    """A response on its way to the client. The start is held back until there is something to follow it."""

    def __init__(self, send: Send):
        self._send = send
        self._start: Message | None = None
        self.begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if not self.begun and self._start is not None:
            self.begun = True
            await self._send(self._start)
        await self._send(message)

    async def fail(self) -> None:
        """End an event stream with an error. Raises UnavailableError for other responses, to break the connection."""
        error = UnavailableError("the replica ended while it worked on the request; send it again")
        content_type = Headers(raw=self._start["headers"]).get("content-type", "") if self._start else ""
        if not content_type.startswith("text/event-stream"):
            raise error
        text = format_event(json.dumps(error_response(error)[1])) + DONE
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": False})
