"""The cache of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.cache.entries import PagedEntries
from model.cache.pages import PageTable
from model.cache.parts import CachePart, CompressorPart, GrowingPart, WindowPart
from model.cache.recurrent_state import RecurrentState
from model.cache.ring import CompressorState, WindowCache

FixedState = WindowCache | CompressorState | RecurrentState


class LayerCache:
    """Cache parts of a layer, as attributes under the names that its mixer declares."""

    def __init__(self, declared: Mapping[str, CachePart], layer: int, table: PageTable, rewind: int):
        self.parts: dict[str, PagedEntries | FixedState] = {}
        for name, part in declared.items():
            if isinstance(part, GrowingPart):
                self.parts[name] = PagedEntries(table, layer, name)
            elif isinstance(part, WindowPart):
                self.parts[name] = WindowCache(table, part, rewind)
            elif isinstance(part, CompressorPart):
                self.parts[name] = CompressorState(table, part, rewind)
            else:
                self.parts[name] = RecurrentState(table, part, rewind)
        vars(self).update(self.parts)

    def __getattr__(self, name: str) -> Any:  # declared parts are found first
        raise AttributeError(f"the layer's mixer declares no cache part '{name}'")

    def fixed(self) -> list[FixedState]:
        """Return the parts of fixed size."""
        return [part for part in self.parts.values() if not isinstance(part, PagedEntries)]
