"""Load on an endpoint: clients that send random requests, cancel, disconnect, and read slowly.

Every request has a known right end. Whatever else happens is recorded as an error of the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

WARM_UP_SHARE = 1 / 3
"""Share of the samples of memory that the slope leaves out."""
_SAMPLE_SECONDS = 1.0
_SHARED = "The quick brown fox jumps over the lazy dog. " * 5


@dataclass
class Report:
    """Outcome of a load."""

    requests: Counter[str] = field(default_factory=Counter)
    """Requests by kind that ended as they should."""
    errors: list[str] = field(default_factory=list)
    tokens: int = 0
    """Generated tokens of the requests that were read to their ends."""
    memory: list[tuple[float, float]] = field(default_factory=list)
    """Samples of minutes since the start and MiB of the server's resident memory."""

    @property
    def slope(self) -> float:
        """Growth of the memory after the warm-up, in MiB per minute."""
        samples = self.memory[int(len(self.memory) * WARM_UP_SHARE) :]
        if len(samples) < 2:
            return 0.0
        return statistics.linear_regression(*zip(*samples)).slope


class Load:
    """Clients of the endpoint at ``url`` for the model ``model``, whose context has ``context`` tokens."""

    def __init__(self, url: str, model: str, context: int, seed: int = 0):
        self.url, self.model, self.context = url, model, context
        self.report = Report()
        self._random = random.Random(seed)
        self._kinds: list[tuple[Callable[[httpx.AsyncClient], Awaitable[None]], float]] = [
            (self.complete, 4),
            (self.stream, 4),
            (self.chat, 2),
            (self.cancelled_stream, 3),
            (self.cancelled_request, 2),
            (self.early_disconnect, 2),
            (self.slow_reader, 2),
            (self.invalid, 1),
        ]

    async def run(self, seconds: float, clients: int, pid: int | None = None) -> Report:
        """Send requests from ``clients`` clients for ``seconds``; sample the memory of process ``pid``."""
        started = time.monotonic()
        sampling = asyncio.create_task(self._sample(pid, started)) if pid is not None else None
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits, trust_env=False) as client:
            await asyncio.gather(*(self._client(client, started + seconds) for _ in range(clients)))
        if sampling is not None:
            sampling.cancel()
        return self.report

    async def _client(self, client: httpx.AsyncClient, end: float) -> None:
        kinds, weights = zip(*self._kinds)
        while time.monotonic() < end:
            [kind] = self._random.choices(kinds, weights)
            try:
                await kind(client)
            except Exception as error:
                self.report.errors.append(f"{kind.__name__}: {type(error).__name__}: {error}")
            else:
                self.report.requests[kind.__name__] += 1

    async def _sample(self, pid: int, started: float) -> None:
        process = psutil.Process(pid)
        while True:
            self.report.memory.append(((time.monotonic() - started) / 60, process.memory_info().rss / 2**20))
            await asyncio.sleep(_SAMPLE_SECONDS)

    def _body(self, **fields: Any) -> dict[str, Any]:
        """Return a random request that fits the context, in part with a prompt that starts like others."""
        length = int(self._random.expovariate(8 / self.context)) + 1
        new = fields.get("max_tokens", self._random.randint(1, 40))
        prompt: Any = [self._random.randrange(2, 30) for _ in range(min(length, self.context - new - 1))]
        if self._random.random() < 0.3:
            prompt = _SHARED[: self._random.randint(1, 200)]
        options: dict[str, Any] = {"temperature": self._random.choice([0, 1]), "seed": self._random.randrange(10**6)}
        return {"model": self.model, "prompt": prompt, "max_tokens": new, **options, **fields}

    async def complete(self, client: httpx.AsyncClient) -> None:
        response = await client.post("/v1/completions", json=self._body(n=self._random.choice([1, 1, 2])))
        _check(response.status_code == 200, response.text)
        self.report.tokens += response.json()["usage"]["completion_tokens"]

    async def chat(self, client: httpx.AsyncClient) -> None:
        messages = [{"role": "user", "content": _SHARED[: self._random.randint(1, 150)]}]
        body = {"model": self.model, "messages": messages, "max_tokens": self._random.randint(1, 20)}
        response = await client.post("/v1/chat/completions", json=body)
        _check(response.status_code == 200, response.text)
        self.report.tokens += response.json()["usage"]["completion_tokens"]

    async def stream(self, client: httpx.AsyncClient) -> None:
        await self._read(client, lambda: asyncio.sleep(0))

    async def slow_reader(self, client: httpx.AsyncClient) -> None:
        await self._read(client, lambda: asyncio.sleep(self._random.random() * 0.1))

    async def _read(self, client: httpx.AsyncClient, pause: Callable[[], Awaitable[None]]) -> None:
        body = self._body(stream=True, stream_options={"include_usage": True})
        async with client.stream("POST", "/v1/completions", json=body) as response:
            _check(response.status_code == 200, f"status {response.status_code}")
            last = ""
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    _check("error" not in event, line)
                    self.report.tokens += (event.get("usage") or {}).get("completion_tokens", 0)
                last = line or last
                await pause()
        _check(last == "data: [DONE]", f"the stream ended with {last!r}")

    async def cancelled_stream(self, client: httpx.AsyncClient) -> None:
        """Read some events, then close the connection."""
        left = self._random.randint(0, 8)
        async with client.stream("POST", "/v1/completions", json=self._body(stream=True)) as response:
            _check(response.status_code == 200, f"status {response.status_code}")
            async for _ in response.aiter_lines():
                left -= 1
                if left < 0:
                    return

    async def cancelled_request(self, client: httpx.AsyncClient) -> None:
        """Give a request up after a random time."""
        request = asyncio.ensure_future(client.post("/v1/completions", json=self._body(max_tokens=60)))
        await asyncio.wait({request}, timeout=self._random.random() * 0.3)
        if request.done():
            _check(request.result().status_code == 200, request.result().text)
        request.cancel()

    async def early_disconnect(self, client: httpx.AsyncClient) -> None:
        """Send a request, or a part of one, and close the connection without reading."""
        address = urlsplit(self.url)
        content = json.dumps(self._body(stream=self._random.random() < 0.5)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        sent = self._random.choice([head[:20], head, head + content[:5], head + content])
        _, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(sent)
        await writer.drain()
        writer.close()

    async def invalid(self, client: httpx.AsyncClient) -> None:
        wrong = self._random.choice([{"temperature": 9}, {"max_tokens": -1}, {"unknown": 1}, {"prompt": [10**9]}])
        response = await client.post("/v1/completions", json=self._body(**wrong))
        _check(400 <= response.status_code < 500, response.text)


def _check(right: bool, found: str) -> None:
    if not right:
        raise RuntimeError(found[:300])
