"""Settings of the HTTP interface."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_ORIGIN = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s*?#@]+")


def _check_origin(origin: str) -> str:
    if origin != "*" and not _ORIGIN.fullmatch(origin):
        raise ValueError("expected an origin such as http://localhost:3000, without a path, or *")
    return origin


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Origin = Annotated[str, AfterValidator(_check_origin)]


class HttpConfig(BaseModel):
    """Limits of the HTTP interface, and the web pages that may use it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_body_bytes: Annotated[int, Field(ge=1024)] = 32_000_000
    """The server answers 413 to a larger request body, before or after decompression. The default fits a million token
    IDs of six digits."""
    keep_alive_seconds: Annotated[float, Field(gt=0)] = 1.0
    """A stream without output for this time sends a comment, which event-stream clients skip."""
    allowed_origins: Annotated[tuple[Origin, ...], BeforeValidator(_listed)] = ()
    """Origins of web pages whose scripts may call the server (CORS), or ``*`` for all pages. May be a single one."""
