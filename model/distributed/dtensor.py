"""Sharded tensors: the rows of a tensor that a rank holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


class RowRange(NamedTuple):
    """Rows ``begin`` to ``end`` of a tensor with ``rows`` rows."""

    begin: int
    end: int
    rows: int


def range_of(rows: int, rank: int, world: int) -> RowRange:
    """Return the rows of ``rank``: equal chunks, of which the last ones may be shorter or empty."""
    chunk = -(-rows // world)
    return RowRange(min(rank * chunk, rows), min((rank + 1) * chunk, rows), rows)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds only a part of the tensor. Checks an attribute: importing DTensor takes most of a
    second."""
    return hasattr(tensor, "placements")


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor, sharing its memory; any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_ranges(named: Iterable[tuple[str, Tensor]]) -> dict[str, RowRange]:
    """Return this rank's rows of the sharded tensors, by name."""
    found = {}
    for name, tensor in named:
        if is_sharded(tensor):
            mesh = tensor.device_mesh  # type: ignore[attr-defined]
            found[name] = range_of(tensor.shape[0], mesh.get_local_rank(), mesh.size())
    return found
