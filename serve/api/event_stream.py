"""Server-sent events."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

KEEP_ALIVE = ": keep-alive\n\n"
"""A comment, which clients skip. It shows clients and proxies that the server is at work on a long prompt, and the
server that a client has left."""
DONE = "data: [DONE]\n\n"
"""The last event of every stream."""
OBFUSCATION_BLOCK = 64


def format_event(content: str) -> str:
    """Return an event with ``content``, a single line."""
    return f"data: {content}\n\n"


def obfuscation(content: str) -> str:
    """Return random characters that fill ``content`` up to a multiple of 64 characters."""
    length = -len(content) % OBFUSCATION_BLOCK
    return secrets.token_hex(length)[:length]


class EventStreamResponse(StreamingResponse):
    """Response of server-sent events. Calls ``close`` when it ends for any reason."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], close: Callable[[], Any]):
        # The second header keeps nginx from collecting events.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect):  # servers report it in one of two ways
                await super().__call__(scope, receive, send)
        finally:
            self._close()
