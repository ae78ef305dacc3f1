"""Tensors on disk and their destinations in the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["transformers", "released", "modules"]
"""Conventions of names and dtypes: those of transformers' files, those of the authors' release, or those of
transformers' modules in memory where its files differ."""
WeightFormat = Literal["fp8", "fp4", "bf16", "fp32", "int64"]


@dataclass(frozen=True)
class TensorSlice:
    """Destination in our model of a stored tensor, or of some rows of its matrices."""

    ours: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    """Rows of the stored tensor; None for all."""
    our_rows: tuple[int, int] | None = None
    """Rows of our tensor; None for all."""


@dataclass(frozen=True)
class Source:
    """A stored tensor: its name, unquantized shape, format in the released layout and destinations in our model."""

    name: str
    shape: tuple[int, ...]
    format: WeightFormat
    parts: tuple[TensorSlice, ...]


def split_name(ours: str) -> tuple[str, str]:
    """Split our name of a tensor after the number of its layer or module: ``layers.3.`` and ``attn.wo.weight``."""
    head, _, rest = ours.partition(".")
    if head not in ("layers", "mtp"):
        return "", ours
    number, _, leaf = rest.partition(".")
    return f"{head}.{number}.", leaf
