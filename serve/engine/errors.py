"""Errors of a single request. Other requests are not affected."""

from __future__ import annotations

from model.errors import FiftyfoldError


class RequestError(FiftyfoldError):
    """A request that this model cannot serve. ``param`` names the field; ``code`` is machine-readable."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFullError(FiftyfoldError):
    """The queue is full; the request may succeed later."""


class RequestTimeoutError(FiftyfoldError):
    """The request did not finish within its time limit."""


class RequestAbortedError(FiftyfoldError):
    """The request was aborted, by its client or by a server shutting down."""


class EngineError(FiftyfoldError):
    """The engine or its model failed."""
