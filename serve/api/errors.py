"""Every failure as OpenAI's error object: ``{"error": {"message", "type", "param", "code"}}``."""

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

    def __init__(self, asked: str, served: str):
        super().__init__(f"model: '{asked}' is not served here, '{served}' is", param="model", code="model_not_found")


# The first class that fits: status, type, code where the error has none of its own.
_KINDS: tuple[tuple[type[FiftyfoldError], int, str, str | None], ...] = (
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


def describe(error: FiftyfoldError) -> tuple[int, dict[str, Any]]:
    """(HTTP status, error object) of an error that the server raised on purpose."""
    status, type, code = next((s, t, c) for cls, s, t, c in _KINDS if isinstance(error, cls))
    if isinstance(error, RequestError):
        return status, error_body(str(error), type, error.param, error.code)
    return status, error_body(str(error), type, code=code)


class BodyLimit:
    """ASGI middleware that refuses a request body larger than ``max_bytes``, declared or counted as it comes.

    The framework has a limit of its own, which answers in plain text.
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"the body is larger than the {self._max_bytes} bytes that are taken"
        declared = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if declared.isdecimal() and int(declared) > self._max_bytes:
            response = JSONResponse(error_body(message, "invalid_request_error"), 413)
            return await response(scope, receive, send)
        total = 0

        async def counted() -> Message:
            nonlocal total
            part = await receive()
            total += len(part.get("body", b""))
            if total > self._max_bytes:
                raise HTTPException(413, message)
            return part

        await self._app(scope, counted, send)


def install(app: FastAPI) -> None:
    """Make ``app`` answer in this shape whatever goes wrong, the framework's own errors included."""

    @app.exception_handler(FiftyfoldError)
    async def on_our_error(request: Request, error: FiftyfoldError) -> JSONResponse:
        status, body = describe(error)
        return JSONResponse(body, status, headers={"Retry-After": "1"} if status == 429 else None)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = _sentence(error.errors()[0])
        return JSONResponse(error_body(message, "invalid_request_error", param), 400)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"there is nothing at {request.method} {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
        }.get(error.status_code, error.detail)
        return JSONResponse(error_body(message, "invalid_request_error"), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(f"the server failed ({type(error).__name__})", "server_error"), 500)


def _sentence(item: Any) -> tuple[str, str | None]:
    """(message, offending field) of one pydantic error."""
    path = [str(part) for part in item["loc"] if part != "body"]
    if item["type"] == "json_invalid":
        return f"the body is not valid JSON: {item['ctx']['error']} at character {item['loc'][-1]}", None
    if not path and item["type"] != "value_error":
        return "the body must be a JSON object, sent with Content-Type: application/json", None
    message = {"extra_forbidden": "unknown field", "missing": "missing"}.get(
        item["type"], item["msg"].removeprefix("Value error, ")
    )
    if not path:  # a check over several fields names the one at fault itself
        return message, message.split(":")[0]
    return f"{'.'.join(path)}: {message}", path[0]
