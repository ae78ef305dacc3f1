"""The attention mass of entries: the probabilities of the joint softmax, summed over heads."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

_EVERY = slice(None)


class EntryMass(Protocol):
    """The mass of the entries that every query attends to. It has no gradient."""

    def of(self, queries: slice = _EVERY) -> Tensor:
        """Return the mass of some consecutive queries: float32 [B, queries, T or K]."""


class StoredMass:
    """A mass that the attention has computed: float32 [B, S, T or K]."""

    def __init__(self, mass: Tensor):
        self._mass = mass

    def of(self, queries: slice = _EVERY) -> Tensor:
        return self._mass[:, queries]
