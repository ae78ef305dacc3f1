"""API key: where it comes from, and the check of every request.

The key itself is in no setting, so that it does not appear in recipes, logs, or Ray's dashboard. A running server keeps
its digest only.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from pathlib import Path

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from model.errors import ConfigError
from model.regular_files import check_regular
from serve.api.config import HttpConfig
from serve.api.errors import METHOD, error_body

OPEN_PATHS = frozenset({"/", "/health", "/healthz"})
"""Paths that need no key: the page, which holds no data, and the health checks of probes that cannot send one."""
_KEY = re.compile(r"[\x21-\x7e]{8,512}")


def read_key(config: HttpConfig) -> str | None:
    """Return the API key that ``config`` points to, or None if requests need none.

    Surrounding spaces and newlines are dropped. Raises ConfigError for a key that is missing or malformed.
    """
    if config.api_key_file is not None:
        source = f"api_key_file: {config.api_key_file}"
        try:
            check_regular(Path(config.api_key_file))
            key = Path(config.api_key_file).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}") from None
        except UnicodeDecodeError:
            key = ""
    elif config.api_key_variable is not None:
        source = f"api_key_variable: {config.api_key_variable}"
        if config.api_key_variable not in os.environ:
            raise ConfigError(f"{source}: not set in the environment of this process")
        key = os.environ[config.api_key_variable]
    else:
        return None
    if not _KEY.fullmatch(key.strip()):
        raise ConfigError(f"{source}: the key must be 8 to 512 printable ASCII characters without spaces")
    return key.strip()


class Authorization:
    """Answer 401 to requests without the API key, except on :data:`OPEN_PATHS` and to OPTIONS."""

    def __init__(self, app: ASGIApp, key_digest: bytes):
        self._app = app
        self._digest = key_digest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        needs_key = scope["type"] == "http" and scope["path"] not in OPEN_PATHS and scope.get(METHOD) != "OPTIONS"
        if not needs_key:
            return await self._app(scope, receive, send)
        scheme, _, sent = Headers(scope=scope).get("authorization", "").partition(" ")
        # The digests have equal lengths, so that the time of the comparison says nothing about the key.
        matches = hmac.compare_digest(digest(sent.strip()), self._digest)
        if scheme.lower() == "bearer" and matches:
            return await self._app(scope, receive, send)
        problem = "wrong API key" if scheme else "missing API key"
        message = f"{problem}; send it as Authorization: Bearer <key>"
        body = error_body(message, "invalid_request_error", code="invalid_api_key")
        await JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})(scope, receive, send)


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
