"""What can go wrong with one request. Others are never affected."""

from __future__ import annotations

from model.errors import FiftyfoldError


class RequestError(FiftyfoldError):
    """A request that this model cannot take. ``param`` names the field, ``code`` is for programs."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFullError(FiftyfoldError):
    """As many requests wait as may wait; the same request may succeed later."""


class RequestTimeoutError(FiftyfoldError):
    """The request was not finished in the time a request may take."""


class RequestAbortedError(FiftyfoldError):
    """The request was given up, by its client or by a server that stops."""


class EngineError(FiftyfoldError):
    """The model failed while it worked on this request."""
