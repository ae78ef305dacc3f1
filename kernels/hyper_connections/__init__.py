"""Manifold-constrained hyper-connections: several residual streams, mixed by doubly stochastic matrices.

On a CPU they run as native operators (``cpu.cpp``), or without those as batched products (``batched.py``); elsewhere as
written in ``reference.py``. ``backend=`` forces one and :func:`backend_for` tells which one runs.
"""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.hyper_connections import batched, cpu, reference
from kernels.hyper_connections.recomputed import RecomputedStreams
from kernels.hyper_connections.reference import sinkhorn

BACKENDS = {"reference": reference, "batched": batched, "cpu": cpu}


def backend_for(x: Tensor) -> str:
    if native.serves(x, backward=True) and x.shape[-2] <= cpu.MAX_STREAMS:
        return "cpu"
    return "batched" if x.device.type == "cpu" and x.dtype.itemsize == 4 else "reference"


def enter(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`kernels.hyper_connections.reference.enter`."""
    chosen = BACKENDS[backend or backend_for(streams)]
    return chosen.enter(streams, fn, scale, base, iterations, eps, norm_eps)


def head(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    eps: float,
    norm_eps: float,
    backend: str | None = None,
) -> Tensor:
    """See :func:`kernels.hyper_connections.reference.head`."""
    return BACKENDS[backend or backend_for(streams)].head(streams, fn, scale, base, eps, norm_eps)


def expand(streams: Tensor, comb: Tensor, post: Tensor, output: Tensor, backend: str | None = None) -> Tensor:
    """See :func:`kernels.hyper_connections.reference.expand`."""
    return BACKENDS[backend or backend_for(streams)].expand(streams, comb, post, output)


__all__ = ["BACKENDS", "RecomputedStreams", "backend_for", "enter", "expand", "head", "sinkhorn"]
