"""Route that reports the bytes of the live caches."""

from __future__ import annotations

from fastapi import FastAPI

from model.costs import cache_bytes_per_token, gqa8_costs
from model.costs.references import GQA_HEAD_DIM, GQA_HEADS
from serve.api.schemas.cache import CacheReport, CacheSize, KeptPrefixes, Pages, SequenceCache
from serve.engine import Engine

REFERENCE = f"grouped-query attention with {GQA_HEADS} key-value heads of {GQA_HEAD_DIM} dims in BF16 at the same depth"
"""Usual in large models. A narrow network, such as ``tiny``, would have fewer and smaller heads."""


class CacheReporter:
    """Reports of an engine's caches: bytes by component, and times smaller than those of :data:`REFERENCE`."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._pool, config = engine.memory.pool, engine.model_config
        growing = [part for part, size in cache_bytes_per_token(config).items() if size]
        self.page_bytes = {part: self._pool.page_bytes(part) for part in growing}
        """Bytes of one page by component."""
        self.state_bytes = {part: size for part, size in engine.memory.state_components.items() if size}
        """Bytes of one sequence's fixed state by component."""
        self._reference = gqa8_costs(config)

    def total(self) -> CacheSize:
        """Return the bytes in use, of running completions and kept prefixes together."""
        states = len(self._engine.running) + len(self._engine.memory.prefixes)
        return self._size(self._engine.memory.used_pages, states)

    def report(self) -> CacheReport:
        memory, engine = self._engine.memory, self._engine
        sequences = []
        for sequence in engine.running:
            tokens = max(0, sequence.stored_tokens)
            size = self._size(memory.pages_for(tokens), 1)
            sequences.append(
                SequenceCache(
                    tokens=tokens,
                    prompt_tokens=sequence.prompt_length,
                    completion_tokens=sequence.completion_tokens,
                    shared_tokens=sequence.cached_tokens,
                    times_smaller=self._reference.cache_bytes(tokens) / size.bytes if size.bytes else None,
                    **size.model_dump(),
                )
            )
        context = engine.model_config.max_positions
        return CacheReport(
            total=self.total(),
            sequences=sequences,
            pages=Pages(
                used=memory.used_pages,
                free=self._pool.free_pages,
                tokens=self._pool.page_tokens,
                bytes=self._pool.page_bytes(),
            ),
            kept_prefixes=KeptPrefixes(count=len(memory.prefixes), capacity=memory.prefixes.capacity),
            reference=REFERENCE,
            times_smaller_at_full_context=self._reference.cache_bytes(context) / memory.cache_bytes(context),
        )

    def _size(self, pages: int, states: int) -> CacheSize:
        components = {part: pages * size for part, size in self.page_bytes.items()}
        for part, size in self.state_bytes.items():
            components[part] = components.get(part, 0) + states * size
        return CacheSize(bytes=sum(components.values()), components=components)


def add_routes(app: FastAPI, reporter: CacheReporter) -> None:
    @app.get("/v1/cache")
    async def cache() -> CacheReport:
        return reporter.report()
