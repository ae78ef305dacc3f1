"""Server-sent events."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
KEEP_ALIVE = ": keep-alive\n\n"
"""A comment, which clients skip."""
DONE = "data: [DONE]\n\n"
"""The last event of every stream."""
OBFUSCATION_BLOCK = 64


@dataclass(frozen=True)
class Pace:
    """Times between the events of a stream."""

    interval: float = 0.0
    """Least seconds between two chunks of text."""
    keep_alive: float = 1.0
    """Seconds of silence after which a comment is sent."""


async def in_batches(items: AsyncIterator[T], interval: float) -> AsyncIterator[list[T]]:
    """Yield all of ``items`` in lists: the first one at once, later ones at least ``interval`` seconds apart.

    The last list does not wait for the interval. An error of ``items`` is raised after the items before it. With an
    interval of 0, every list has one item.
    """
    if not interval:
        async for item in items:
            yield [item]
        return
    ready: list[T] = []
    arrived = asyncio.Event()

    async def collect() -> None:
        async for item in items:
            ready.append(item)
            arrived.set()

    collecting = asyncio.ensure_future(collect())
    collecting.add_done_callback(lambda _: arrived.set())
    try:
        while not (collecting.done() and not ready):
            await arrived.wait()
            arrived.clear()
            if ready:
                batch = ready.copy()
                ready.clear()
                yield batch
                await asyncio.wait({collecting}, timeout=interval)
        collecting.result()
    finally:
        collecting.cancel()


def format_event(content: str) -> str:
    """Return an event with ``content``, a single line."""
    return f"data: {content}\n\n"


def obfuscation(content: str) -> str:
    """Return random characters that fill ``content`` up to a multiple of 64 characters."""
    length = -len(content) % OBFUSCATION_BLOCK
    return secrets.token_hex(length)[:length]


async def with_keep_alive(events: AsyncIterator[str], seconds: float) -> AsyncIterator[str]:
    """Yield ``events``, and a comment whenever no event has come for ``seconds``.

    Comments show clients and proxies that the server is at work on a long prompt, and show the server a client that
    has left.
    """
    while True:
        following = asyncio.ensure_future(anext(events))
        try:
            while not (await asyncio.wait({following}, timeout=seconds))[0]:
                yield KEEP_ALIVE
            event = following.result()
        except StopAsyncIteration:
            return
        finally:
            following.cancel()
        yield event


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
