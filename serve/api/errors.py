"""Error responses in OpenAI's format: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.errors import FiftyfoldError
from serve.engine import EngineError, QueueFullError, RequestAbortedError, RequestError, RequestTimeoutError


class ModelNotFoundError(RequestError):
    """The request names a model that is not served."""

    def __init__(self, requested: str, served: str):
        super().__init__(
            f"model: '{requested}' is not served here, only '{served}' is", param="model", code="model_not_found"
        )


# The first matching class decides: HTTP status, error type, and a code for errors without their own.
_RESPONSES: tuple[tuple[type[FiftyfoldError], int, str, str | None], ...] = (
    (ModelNotFoundError, 404, "invalid_request_error", None),
    (RequestError, 400, "invalid_request_error", None),
    (QueueFullError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (RequestTimeoutError, 504, "timeout_error", "request_timeout"),
    (RequestAbortedError, 503, "server_error", "aborted"),
    (EngineError, 500, "server_error", "engine_error"),
    (FiftyfoldError, 500, "server_error", None),
)


def error_body(message: str, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def error_response(error: FiftyfoldError) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and body for ``error``."""
    status, type, code = next((s, t, c) for cls, s, t, c in _RESPONSES if isinstance(error, cls))
    if isinstance(error, RequestError):
        return status, error_body(str(error), type, error.param, error.code)
    return status, error_body(str(error), type, code=code)


class BodySizeLimit:
    """ASGI middleware that refuses request bodies larger than ``max_bytes``, declared or received.

    FastAPI's own limit would answer in plain text.
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"the request body is larger than the limit of {self._max_bytes} bytes"
        declared = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if declared.isdecimal() and int(declared) > self._max_bytes:
            response = JSONResponse(error_body(message, "invalid_request_error"), 413)
            return await response(scope, receive, send)
        total = 0

        async def limited_receive() -> Message:
            nonlocal total
            event = await receive()
            total += len(event.get("body", b""))
            if total > self._max_bytes:
                raise HTTPException(413, message)
            return event

        await self._app(scope, limited_receive, send)


def add_handlers(app: FastAPI) -> None:
    """Make ``app`` report every error in OpenAI's format, including errors raised by FastAPI."""

    @app.exception_handler(FiftyfoldError)
    async def on_fiftyfold_error(request: Request, error: FiftyfoldError) -> JSONResponse:
        status, body = error_response(error)
        return JSONResponse(body, status, headers={"Retry-After": "1"} if status == 429 else None)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = _validation_message(error.errors()[0])
        return JSONResponse(error_body(message, "invalid_request_error", param), 400)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"no route for {request.method} {request.url.path}",
            405: f"{request.url.path} does not accept {request.method}",
        }.get(error.status_code, error.detail)
        return JSONResponse(error_body(message, "invalid_request_error"), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def on_unexpected_error(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(f"internal server error ({type(error).__name__})", "server_error"), 500)


def _validation_message(item: Any) -> tuple[str, str | None]:
    """Return the message and the offending field of one pydantic error."""
    path = [str(part) for part in item["loc"] if part != "body"]
    if item["type"] == "json_invalid":
        return f"the body is not valid JSON: {item['ctx']['error']} at character {item['loc'][-1]}", None
    if not path and item["type"] != "value_error":
        return "the body must be a JSON object, sent with Content-Type: application/json", None
    message = {"extra_forbidden": "unknown field", "missing": "missing"}.get(
        item["type"], item["msg"].removeprefix("Value error, ")
    )
    if not path:  # the message of a model validator starts with the field's name
        return message, message.split(":")[0]
    return f"{'.'.join(path)}: {message}", path[0]
