"""Settings of the HTTP interface."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

_ORIGIN = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s*?#@]+")


def _check_origin(origin: str) -> str:
    if origin != "*" and not _ORIGIN.fullmatch(origin):
        raise ValueError("expected an origin such as http://localhost:3000, without a path, or *")
    return origin


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_host(host: str) -> str:
    try:
        is_loopback(host)
    except ValueError:
        raise ValueError("expected an IP address, such as 127.0.0.1, or localhost") from None
    return host


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address. Raises ValueError for a host name."""
    return host == "localhost" or ipaddress.ip_address(host).is_loopback


Host = Annotated[str, AfterValidator(_check_host)]
"""Address to listen on."""
Origin = Annotated[str, AfterValidator(_check_origin)]


class HttpConfig(BaseModel):
    """Limits of the HTTP interface, and the web pages that may use it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_body_bytes: Annotated[int, Field(ge=1024)] = 32_000_000
    """The server answers 413 to a larger request body, before or after decompression. The default fits a million token
    IDs of six digits."""
    keep_alive_seconds: Annotated[float, Field(gt=0)] = 1.0
    """A stream without output for this time sends a comment, which event-stream clients skip."""
    stream_interval_seconds: Annotated[float, Field(ge=0)] = 0.03
    """Least time between two chunks of a stream, which hold all text of that time. More than six streams wait longer,
    up to 0.2 s, so that up to 40 of them have 200 chunks per second together. The first chunk and the end of a stream
    do not wait. 0 sends one chunk per token."""
    allowed_origins: Annotated[tuple[Origin, ...], BeforeValidator(_listed)] = ()
    """Origins of web pages whose scripts may call the server (CORS), such as ``http://localhost:3000``; ``*`` for all
    pages. A single one needs no list."""
    api_key_file: Annotated[str, Field(min_length=1)] | None = None
    """File that holds the API key, readable from every node of the cluster. Requests then need the header
    ``Authorization: Bearer <key>`` (:mod:`serve.api.authorization`)."""
    api_key_variable: str | None = None
    """Environment variable of the replicas' processes that holds the API key, instead of a file."""

    @field_validator("api_key_variable")
    @classmethod
    def _check_key_source(cls, variable: str | None, info: ValidationInfo) -> str | None:
        if variable is not None and info.data.get("api_key_file") is not None:
            raise ValueError("set api_key_file or api_key_variable, not both")
        return variable

    @property
    def needs_key(self) -> bool:
        return self.api_key_file is not None or self.api_key_variable is not None

    def behind_gateway(self) -> HttpConfig:
        """Return the settings of a replica, whose gateway checks keys and origins."""
        return self.model_copy(update={"api_key_file": None, "api_key_variable": None, "allowed_origins": ()})
