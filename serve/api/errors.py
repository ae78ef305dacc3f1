"""Error responses in OpenAI's format: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from model.errors import FiftyfoldError, shorten_words
from serve.api.schemas.validation import describe
from serve.engine import EngineError, QueueFullError, RequestAbortedError, RequestError, RequestTimeoutError


class ModelNotFoundError(RequestError):
    """The request names a model that is not served."""

    def __init__(self, requested: str, served: Collection[str]):
        names = ", ".join(f"'{name}'" for name in served)
        super().__init__(
            f"model: '{requested}' is not served here, only {names} {'is' if len(served) == 1 else 'are'}",
            param="model",
            code="model_not_found",
        )


class UnavailableError(FiftyfoldError):
    """No replica of the model can answer now; the request may succeed later."""


# The first matching class decides: HTTP status, error type, and a code for errors without their own.
_RESPONSES: tuple[tuple[type[FiftyfoldError], int, str, str | None], ...] = (
    (ModelNotFoundError, 404, "invalid_request_error", None),
    (RequestError, 400, "invalid_request_error", None),
    (QueueFullError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (RequestTimeoutError, 504, "timeout_error", "request_timeout"),
    (RequestAbortedError, 503, "server_error", "aborted"),
    (UnavailableError, 503, "server_error", "unavailable"),
    (EngineError, 500, "server_error", "engine_error"),
    (FiftyfoldError, 500, "server_error", None),
)


METHOD = "fiftyfold.method"
"""Key of an ASGI scope: the method of a request that is routed as another one (HEAD as GET)."""
CLIENT_CLOSED_REQUEST = 499
"""Status for access logs only; the client has disconnected."""
MAX_MESSAGE_CHARS = 500


def error_body(message: str, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the body of an error response. Text that the client sent is made printable and shortened."""
    param = None if param is None else _printable(param)
    return {"error": {"message": _printable(message), "type": type, "param": param, "code": code}}


def _printable(text: str) -> str:
    """Return one printable line: escape control characters and surrogates, and cut the middle out of long words and of
    a long text."""
    text = shorten_words(text)
    if len(text) > MAX_MESSAGE_CHARS:
        half = MAX_MESSAGE_CHARS // 2
        text = f"{text[:half]} … {text[-half:]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def error_response(error: FiftyfoldError) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and body for ``error``."""
    status, type, code = next((s, t, c) for cls, s, t, c in _RESPONSES if isinstance(error, cls))
    if isinstance(error, RequestError):
        return status, error_body(str(error), type, error.param, error.code)
    return status, error_body(str(error), type, code=code)


def add_handlers(app: FastAPI) -> None:
    """Make ``app`` report every error in OpenAI's format, including errors raised by FastAPI."""

    @app.exception_handler(FiftyfoldError)
    async def on_fiftyfold_error(request: Request, error: FiftyfoldError) -> JSONResponse:
        status, body = error_response(error)
        return JSONResponse(body, status, headers={"Retry-After": "1"} if status == 429 else None)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = describe(error.errors()[0])
        return JSONResponse(error_body(message, "invalid_request_error", param), 400)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        method, path = request.scope.get(METHOD, request.method), request.scope["path"]
        if error.status_code == 405:
            methods = {*headers.get("Allow", "").split(", "), "OPTIONS"}
            methods |= {"HEAD"} if "GET" in methods else set()
            headers["Allow"] = ", ".join(sorted(methods))
            if method == "OPTIONS":
                return Response(status_code=204, headers=headers)
        message = {
            404: f"no route for {method} {path}",
            405: f"{path} does not accept {method}, only {headers.get('Allow')}",
        }.get(error.status_code, error.detail)
        return JSONResponse(error_body(message, "invalid_request_error"), error.status_code, headers=headers)

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def on_unexpected_error(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(f"internal server error ({type(error).__name__})", "server_error"), 500)
