"""Predicted speed of kernels: an upper bound from their work, the compiled figures and the figures of a GPU.

A launch takes as long as the slowest of: matrix products and vector arithmetic (estimated, or counted in the compiled
loop), device memory, the second-level cache, and atomic additions. Where a multiprocessor holds a single program,
nothing overlaps its products with its arithmetic, and their times add up. Latency, launches and load imbalance are left
out, so that a measured speed is lower.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.triton_support.compilation import Compiled
from kernels.triton_support.plans import Plan
from kernels.triton_support.tiles import Tile


@dataclass(frozen=True)
class Gpu:
    """Vendor figures of a GPU, per second, except where noted."""

    name: str
    architecture: str
    flops: float
    """BF16 products, dense."""
    bandwidth: float
    """Bytes of device memory."""
    cache_bandwidth: float
    """Bytes of the second-level cache. An estimate from published microbenchmarks."""
    vector_ops: float
    """32-bit instructions of all lanes."""
    old_instructions: float = 1.0
    """Share of ``flops`` that warp-level matrix instructions (``HMMA``) reach. An estimate likewise."""


H100 = Gpu("H100 SXM", "sm_90", 989e12, 3.35e12, 5.5e12, 132 * 128 * 1.755e9, 0.62)
_LANES = 32
_ATOMIC_SHARE = 0.5
"""Share of the cache's bandwidth that float32 additions reach: they read and write."""


@dataclass(frozen=True)
class Prediction:
    """Shortest time of a launch, in seconds, and its cause."""

    seconds: float
    bound: str
    flops_per_second: float
    bytes_per_second: float
    bandwidth_share: float
    flops_share: float

    def __str__(self) -> str:
        if self.flops_per_second and self.bound != "memory":
            speed = f"{self.flops_per_second / 1e12:.0f} TFLOP/s ({self.flops_share:.0%})"
        else:
            speed = f"{self.bytes_per_second / 1e12:.2f} TB/s ({self.bandwidth_share:.0%})"
        return f"{speed}, bound by {self.bound}"


def predict(plan: Plan, tile: Tile, compiled: Compiled) -> Prediction:
    """Return the prediction on an H100 for a plan with work and one of its settings, whose figures ``compiled`` are.
    Raises ValueError for figures of another architecture."""
    gpu = H100
    if compiled.architecture != gpu.architecture or plan.work is None:
        raise ValueError(f"{plan.name}: no prediction for {compiled.architecture} on {gpu.name}")
    work = plan.work
    rate = gpu.flops * work.rate * (gpu.old_instructions if compiled.uses_old_instructions else 1.0)
    matrix, vector = work.flops / rate, work.vector_ops / gpu.vector_ops
    if work.loops is not None:
        issued = work.loops(tile) * compiled.warps * compiled.loop
        vector = max(vector, issued / (gpu.vector_ops / _LANES))
    overlaps = compiled.programs > 1
    times = {
        "products": max(matrix, vector) if overlaps else matrix + vector,
        "memory": work.nbytes / gpu.bandwidth,
        "cache": work.cache_bytes / gpu.cache_bandwidth,
        "atomics": work.atomic_bytes / (gpu.cache_bandwidth * _ATOMIC_SHARE),
    }
    bound = max(times, key=lambda name: times[name])
    seconds = times[bound]
    speed, moved = work.flops / seconds, work.nbytes / seconds
    return Prediction(seconds, bound, speed, moved, moved / gpu.bandwidth, speed / gpu.flops)
