"""Metrics of a replica in Prometheus's text format."""

from __future__ import annotations

import time
from collections.abc import Iterator

from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.cache import CacheReporter
from serve.engine import Delta, Engine, RequestAbortedError, RequestTimeoutError
from serve.engine.sequence import Sequence

PREFIX = "fiftyfold"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)
OTHER_ROUTE = "other"
"""Label of requests that no route accepts: their paths are the clients' choice."""


class Metrics:
    """Metrics of an engine and of the requests to it, in a registry of their own.

    :meth:`observe` is an observer of the engine. Gauges and totals of the engine are read when they are asked for.
    """

    def __init__(self, engine: Engine, reporter: CacheReporter):
        self._timeout = engine.config.request_timeout_seconds
        self._last_seen: dict[int, float] = {}
        """Time of the newest output of each unfinished completion, on the clock of time.monotonic."""
        self.registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(engine, reporter))
        self.requests = Counter(
            f"{PREFIX}_requests", "HTTP requests by route and status", ("route", "status"), registry=registry
        )
        self._completions = Counter(
            f"{PREFIX}_completions",
            "Completions by outcome: stop, length, aborted, timeout or error",
            ("outcome",),
            registry=registry,
        )
        self._prompt_tokens = Counter(f"{PREFIX}_prompt_tokens", "Tokens of prompts", registry=registry)
        self._prefix_hits = Counter(
            f"{PREFIX}_prefix_hit_tokens", "Tokens of prompts that were found in a kept prefix", registry=registry
        )
        self._generated_tokens = Counter(f"{PREFIX}_generated_tokens", "Generated tokens", registry=registry)
        self._first_token = self._histogram("time_to_first_token", "Time from arrival to the first token")
        self._inter_token = self._histogram("inter_token", "Time between successive tokens of a completion")
        self._end_to_end = self._histogram("end_to_end", "Time from arrival to the end of a completion")

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}_seconds", text, registry=self.registry, buckets=_SECONDS)

    def observe(self, sequence: Sequence, delta: Delta) -> None:
        """Record an output of the engine."""
        now = time.monotonic()
        arrival = sequence.deadline - self._timeout
        before = self._last_seen.get(id(sequence))
        if before is None and delta.error is None:
            self._prompt_tokens.inc(sequence.prompt_length)
            self._prefix_hits.inc(sequence.cached_tokens)
        if new := delta.tokens:
            self._generated_tokens.inc(new)
            if before is None:
                self._first_token.observe(now - arrival)
            for _ in range(new if before is not None else new - 1):
                self._inter_token.observe((now - before) / new if before is not None else 0.0)
        if delta.final:
            self._last_seen.pop(id(sequence), None)
            self._completions.labels(_outcome(delta)).inc()
            self._end_to_end.observe(now - arrival)
        else:
            self._last_seen[id(sequence)] = now


def _outcome(delta: Delta) -> str:
    if delta.error is None:
        return delta.finish_reason or "error"
    kinds = ((RequestAbortedError, "aborted"), (RequestTimeoutError, "timeout"))
    return next((name for kind, name in kinds if isinstance(delta.error, kind)), "error")


class _EngineCollector(Collector):
    """Gauges and totals that the engine keeps itself."""

    def __init__(self, engine: Engine, reporter: CacheReporter):
        self._engine, self._reporter = engine, reporter

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        engine, stats, memory = self._engine, self._engine.stats, self._engine.memory
        running = len(engine.running)
        gauges = {
            "running": ("Completions that hold a cache", running),
            "waiting": ("Completions in the queue", max(0, engine.unfinished - running)),
            "batch_size": ("Completions that are decoded together", engine.decoding),
            "pages_used": ("Cache pages of completions and kept prefixes", memory.used_pages),
            "pages_free": ("Free cache pages", memory.pool.free_pages),
            "kept_prefixes": ("Kept prefixes of earlier prompts", len(memory.prefixes)),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value)
        components = GaugeMetricFamily(f"{PREFIX}_cache_bytes", "Bytes of the caches", labels=("component",))
        for component, size in self._reporter.total().components.items():
            components.add_metric((component,), size)
        yield components
        totals = {
            "decode_steps": ("Decoding steps", stats.decode_steps),
            "decoded_tokens": ("Tokens computed by decoding steps", stats.decoded_tokens),
            "decode_seconds": ("Time of decoding steps", stats.decode_seconds),
            "prefill_tokens": ("Prompt tokens read, without those found in kept prefixes", stats.prefill_tokens),
            "prefill_seconds": ("Time of reading prompts", stats.prefill_seconds),
            "draft_tokens": ("Tokens drafted by speculative decoding", stats.drafted_tokens),
            "accepted_tokens": ("Drafted tokens that were accepted", stats.accepted_tokens),
            "preemptions": ("Times that a completion lost its cache to a full memory", stats.preemptions),
        }
        for name, (text, total) in totals.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, total)


class CountRequests:
    """Count requests by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", OTHER_ROUTE)
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, send_and_count)


def add_routes(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)
