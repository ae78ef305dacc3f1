"""The Triton kernels, each with arguments that it is compiled for, limits on what the compiler reports, and its work.

A plan's arguments have the sizes of DeepSeek-V4-Flash. :mod:`kernels.triton_support.compilation` compiles it without a
GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kernels.triton_support.tiles import Tile, Tiles

OPERATIONS = (
    "sparse_attention",
    "paged_attention",
    "index_topk",
    "indexer_kl",
    "cache_io",
    "hyper_connections",
    "newton_schulz",
    "compress",
    "ssd_scan",
    "gated_delta_rule",
    "expert_dispatch",
)
"""Packages with a module ``triton_plans`` whose ``PLANS`` lists the kernels."""

TF32X3, BF16X3 = 1 / 6, 1 / 3
"""Shares of the rate of BF16 products that float32 products reach as three TF32 or BF16 products."""


@dataclass(frozen=True)
class Work:
    """Work of one launch at the plan's sizes."""

    flops: float
    """Floating-point operations of the matrix products; 0 for kernels that only move data."""
    nbytes: float
    """Bytes that must cross device memory: every input once and every output once."""
    cache_bytes: float = 0.0
    """Bytes that programs read through the second-level cache, repeated reads included."""
    atomic_bytes: float = 0.0
    """Bytes of atomic additions."""
    vector_ops: float = 0.0
    """Instructions of 32-bit arithmetic per lane outside matrix units; an exponential counts as 8."""
    loops: Callable[[Tile], float] | None = None
    """Returns how often all programs together execute the body of the largest loop. Its compiled instructions then take
    the place of ``vector_ops``."""
    rate: float = 1.0
    """Share of the rate of BF16 products that the products reach."""
    target: str = ""
    """Target of the kernel on an H100, for the table."""


@dataclass(frozen=True)
class Plan:
    """A kernel with the arguments that it is compiled for."""

    name: str
    """``<operation>.<what the kernel computes>``"""
    kernel: str
    """Name of the function in ``kernels/<operation>/triton_kernels.py``."""
    arguments: dict[str, str]
    """Types of the arguments that are not constants: ``*bf16``, ``i32``. ``:16`` marks pointers and integers that are
    multiples of 16, as Triton finds them at a launch."""
    constants: dict[str, Any]
    """Compile-time constants other than those of :meth:`constants_for`."""
    tiles: Tiles
    multiplies: bool = False
    """True if the kernel's products must run on matrix units."""
    copies_ahead: tuple[str, ...] = ()
    """Architectures on which loads must be asynchronous copies to shared memory."""
    max_spills: dict[str, int] = field(default_factory=dict)
    """Largest bytes of registers that a thread spills, per architecture, with Triton 3.9; 0 where absent."""
    work: Work | None = None
    tile_constants: Callable[[Tile], dict[str, Any]] = lambda tile: tile.sizes
    """Returns the compile-time constants of a setting."""

    def constants_for(self, architecture: str, tile: Tile) -> dict[str, Any]:
        """Return all constants for a setting of an architecture."""
        constants = {**self.constants, **self.tile_constants(tile)}
        if constants.get("PRECISION") == "tf32x3" and architecture.startswith("gfx"):
            constants["PRECISION"] = "ieee"  # there are no TF32 products
        return constants

    def function(self) -> Any:
        """Return the kernel. Imports triton."""
        operation = self.name.partition(".")[0]
        return getattr(importlib.import_module(f"kernels.{operation}.triton_kernels"), self.kernel)

    def choices(self) -> Iterator[tuple[str, Tile]]:
        """Yield every architecture with each of its settings."""
        for architecture, tiles in self.tiles.items():
            if architecture != "interpreter":
                for tile in tiles:
                    yield architecture, tile


def all_plans() -> list[Plan]:
    """Return the plans of all operations."""
    plans: list[Plan] = []
    for operation in OPERATIONS:
        plans += importlib.import_module(f"kernels.{operation}.triton_plans").PLANS
    return plans
