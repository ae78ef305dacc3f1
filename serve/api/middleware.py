"""ASGI middleware: paths, HEAD, cross-origin requests, and request bodies."""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import METHOD, error_body

METHODS = "GET, HEAD, POST, OPTIONS"
PREFLIGHT_SECONDS = "600"


class Paths:
    """Route ``/v1/models/`` and ``/v1//models`` like ``/v1/models``, and HEAD like GET with an empty body."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        path = re.sub("/{2,}", "/", scope["path"])
        scope = {**scope, "path": path.rstrip("/") or "/", METHOD: scope["method"]}
        if scope["method"] == "HEAD":
            return await self._app({**scope, "method": "GET"}, receive, send_head)
        return await self._app(scope, receive, send)


class CrossOrigin:
    """Let scripts of web pages from ``origins`` (``*``: all) call the server, by the CORS protocol.

    Requests of other origins are answered without the headers that their browser asks for, so it withholds the answer.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]):
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origin = headers.get("origin")

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer.add_vary_header("Origin")
                if self._allows(origin):
                    answer["Access-Control-Allow-Origin"] = "*" if "*" in self._origins else origin or ""
                    answer["Access-Control-Expose-Headers"] = "Retry-After"
            await send(message)

        if not self._origins or scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] == "OPTIONS" and "access-control-request-method" in headers and self._allows(origin):
            await Response(status_code=204, headers=_preflight(headers))(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)

    def _allows(self, origin: str | None) -> bool:
        return origin is not None and ("*" in self._origins or origin in self._origins)


def _preflight(headers: Headers) -> dict[str, str]:
    """Return headers that allow every method of the server and the request headers that the browser asks for."""
    answer = {"Access-Control-Allow-Methods": METHODS, "Access-Control-Max-Age": PREFLIGHT_SECONDS}
    if requested := headers.get("access-control-request-headers"):
        answer["Access-Control-Allow-Headers"] = requested
    if "access-control-request-private-network" in headers:
        answer["Access-Control-Allow-Private-Network"] = "true"
    return answer


class RequestBodies:
    """Refuse request bodies larger than ``max_bytes``, declared, received or decompressed, and decompress gzip.

    FastAPI's own limit would answer in plain text.
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes
        self._too_large = f"the request body is larger than the limit of {max_bytes} bytes (max_body_bytes)"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > self._max_bytes):
            response = JSONResponse(error_body(self._too_large, "invalid_request_error"), 413)
            return await response(scope, receive, send)
        encoding = headers.get("content-encoding", "identity").strip().lower()
        received = 0
        complete = False

        async def limited_receive() -> Message:
            nonlocal received, complete
            event = await receive()
            received += len(event.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, self._too_large)
            complete = event["type"] == "http.request" and not event.get("more_body", False)
            return event

        async def decompressing_receive() -> Message:
            if complete:
                return await receive()  # waits for a disconnect
            if encoding not in ("gzip", "x-gzip"):
                raise HTTPException(
                    415,
                    f"Content-Encoding: '{encoding}' is not supported; send the body uncompressed or as gzip",
                    headers={"Accept-Encoding": "gzip, identity"},
                )
            parts = []
            while not complete:
                event = await limited_receive()
                if event["type"] != "http.request":
                    return event
                parts.append(event.get("body", b""))
            return {"type": "http.request", "body": self._decompress(b"".join(parts)), "more_body": False}

        plain = encoding in ("", "identity")
        return await self._app(scope, limited_receive if plain else decompressing_receive, send)

    def _decompress(self, data: bytes) -> bytes:
        """Return the content of gzip ``data``. Raises HTTPException for damaged or too much content."""
        member = zlib.decompressobj(16 + zlib.MAX_WBITS)
        try:
            content = member.decompress(data, self._max_bytes + 1)
        except zlib.error as error:
            raise HTTPException(400, f"the body is not valid gzip data ({error})") from None
        if len(content) > self._max_bytes:
            raise HTTPException(413, self._too_large)
        if not member.eof or member.unused_data:
            problem = "data follows its end" if member.eof else "it is incomplete"
            raise HTTPException(400, f"the body is not valid gzip data ({problem})")
        return content
