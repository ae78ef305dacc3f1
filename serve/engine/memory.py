"""Memory of an engine's caches: a page pool of fixed size, shared by running completions and kept prefixes."""

from __future__ import annotations

import torch

from model.cache import Cache
from model.cache.pages import PagePool
from model.config import ModelConfig
from model.costs import fixed_state_bytes
from model.errors import ConfigError
from serve.engine.config import EngineConfig
from serve.engine.prefix_cache import PrefixCache


class CacheMemory:
    """Page pool and kept prefixes within ``config.cache_mebibytes``.

    The fixed state of ``max_active_requests`` completions and of ``kept_prefixes`` prefixes is set aside; the rest is
    pages. Raises ConfigError if no page is left.
    """

    def __init__(self, model_config: ModelConfig, config: EngineConfig, device: torch.device):
        self.model_config = model_config
        self.speculative_tokens = config.speculative_tokens
        self.state_components = fixed_state_bytes(model_config, self.speculative_tokens, self.speculative_tokens > 0)
        """Bytes of one completion's fixed state by component."""
        self.state_bytes = sum(self.state_components.values())
        budget = config.cache_mebibytes << 20
        states = (config.max_active_requests + config.kept_prefixes) * self.state_bytes
        page_bytes = PagePool(model_config, 0, "meta").page_bytes()
        pages = max(0, budget - states) // page_bytes if page_bytes else 0
        if states > budget or (page_bytes and not pages):
            raise ConfigError(
                f"cache_mebibytes: {config.cache_mebibytes} MiB do not hold the fixed state of {states} bytes "
                "(max_active_requests and kept_prefixes) and a page"
            )
        most = (config.max_active_requests + config.kept_prefixes) * -(
            -model_config.max_positions // model_config.page_tokens
        )
        self.pool = PagePool(model_config, min(pages, most), device)
        self.prefixes = PrefixCache(model_config.page_tokens, config.kept_prefixes)

    def new_cache(self) -> Cache:
        """Return an empty cache for one completion."""
        drafts = self.speculative_tokens
        most = self.model_config.max_positions
        return Cache(self.model_config, 1, most, pool=self.pool, rewind=drafts, predicts_ahead=drafts > 0)

    def pages_for(self, tokens: int) -> int:
        """Return the pages of ``tokens`` tokens; 0 if no part of the cache grows."""
        return self.pool.pages_for(tokens) if self.pool.parts else 0

    def cache_bytes(self, tokens: int) -> int:
        """Return the bytes of a completion's cache of ``tokens`` tokens, fixed state included."""
        return self.pages_for(tokens) * self.pool.page_bytes() + self.state_bytes

    @property
    def used_pages(self) -> int:
        return self.pool.pages - self.pool.free_pages

    def make_room(self, pages: int, spared: Cache | None = None) -> bool:
        """Drop kept prefixes, the least recently used first, until ``pages`` pages are free.

        Return False, and drop none, if that would not be enough. ``spared`` is the most recently used prefix, if it
        must be kept.
        """
        if self.pool.free_pages >= pages:
            return True
        if self.pool.free_pages + self.prefixes.evictable_pages(self.pool, spared) < pages:
            return False
        while self.pool.free_pages < pages:
            self.prefixes.evict()
        return True
