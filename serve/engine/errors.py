"""Errors of a single request. Other requests are not affected."""

from __future__ import annotations

from dataclasses import dataclass

from model.errors import FiftyfoldError


class RequestError(FiftyfoldError):
    """A request that this model cannot serve. ``param`` names the field; ``code`` is machine-readable."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code

    @classmethod
    def about(cls, field: str, problem: str, code: str | None = None) -> RequestError:
        """Return an error about a field with a dotted name; ``param`` is its first part."""
        return cls(f"{field}: {problem}", param=field.partition(".")[0], code=code)


@dataclass(frozen=True)
class RequestFields:
    """Names of a completion's fields in the client's request, for errors about them."""

    prompt: str = "prompt"
    """Dotted: the second prompt of a batch is ``prompt.1``."""
    max_tokens: str | None = "max_tokens"
    """None if the client sent no limit."""


class QueueFullError(FiftyfoldError):
    """The queue is full; the request may succeed later."""


class RequestTimeoutError(FiftyfoldError):
    """The request did not finish within its time limit."""


class RequestAbortedError(FiftyfoldError):
    """The request was aborted, by its client or by a server shutting down."""


class EngineError(FiftyfoldError):
    """The engine or its model failed."""
