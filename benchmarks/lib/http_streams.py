"""Clients that measure an OpenAI-style completions endpoint: streams of server-sent events over asyncio sockets."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from model.errors import FiftyfoldError


@dataclass(frozen=True)
class Reading:
    """A stream that was read to its end."""

    first_seconds: float
    """Time from the request to the first event."""
    tokens: int
    """Generated tokens, from the stream's usage."""


async def read_stream(url: str, body: dict[str, Any]) -> Reading:
    """Send a request to ``<url>/v1/completions`` and read its stream. Raises FiftyfoldError for an error."""
    address = urlsplit(url)
    content = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    started, first, tokens = time.perf_counter(), None, 0
    try:
        writer.write(head.encode() + content)
        answer = (await reader.readline()).split(b" ", 2)
        if len(answer) < 2:
            raise FiftyfoldError(f"{url}: the connection was closed without an HTTP answer")
        status = answer[1]
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                if status != b"200" and line.startswith(b"{"):
                    raise FiftyfoldError(f"{url}: status {status.decode()}: {line.decode().strip()}")
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise FiftyfoldError(f"{url}: {event['error']}")
            if first is None:
                first = time.perf_counter() - started
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    finally:
        writer.close()
    if first is None:
        raise FiftyfoldError(f"{url}: status {status.decode()} and no events")
    return Reading(first, tokens)


async def streams_per_second(ask: Callable[[int], Awaitable[int]], streams: int) -> float:
    """Return the tokens per second of concurrent requests, from the first request to the last token.

    ``ask(number)`` runs one request and returns its tokens.
    """
    started = time.perf_counter()
    tokens = await asyncio.gather(*(ask(number) for number in range(streams)))
    return sum(tokens) / (time.perf_counter() - started)


def wait_until_answers(url: str, alive: Callable[[], bool], seconds: float = 120) -> None:
    """Return when ``<url>/health`` answers 200. Raises FiftyfoldError if the server ends, or after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and alive():
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise FiftyfoldError(f"{url}: the server did not become ready")


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the median of ``values`` with the smallest and largest in brackets."""
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}-{high})"
