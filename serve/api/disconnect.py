"""Cancellation of work when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

Result = TypeVar("Result")


async def run_unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Return the result of ``work``. If the client disconnects first, cancel the work and return None.

    The body of the request must have been read.
    """
    running = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({running, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        return running.result() if running.done() else None
    finally:  # also if this coroutine is cancelled, which is how some servers signal a disconnect
        running.cancel()
        disconnected.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
