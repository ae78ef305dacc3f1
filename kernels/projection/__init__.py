"""An attention layer's projections: products with norms and rotations around them.

For few tokens each is one native operator (``cpu.cpp``); otherwise operations run one by one (``reference.py``).
``backend=`` forces one and :func:`backend_for` tells which one runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import linear, native
from kernels.cache_io import EntryLayout
from kernels.projection import cpu, reference
from kernels.projection.reference import key_value

BACKENDS = {"reference": reference, "cpu": cpu}


def backend_for(x: Tensor, *weights: Tensor) -> str:
    """``cpu`` for as few tokens x [B, S, ...] as :mod:`kernels.linear` takes natively with all weights."""
    few = x.shape[0] * x.shape[1] <= linear.FEW_TOKENS and all(map(linear.is_stored_plainly, weights))
    return "cpu" if few and not torch.is_autocast_enabled("cpu") and native.serves(x) else "reference"


def latent_query(
    x: Tensor,
    wq_a: Tensor,
    norm: Tensor,
    wq_b: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`kernels.projection.reference.latent_query`."""
    chosen = BACKENDS[backend or backend_for(x, wq_a, wq_b)]
    return chosen.latent_query(x, wq_a, norm, wq_b, cos, sin, heads, eps)


def packed_key_value(
    x: Tensor,
    wkv: Tensor,
    norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    layout: EntryLayout,
    backend: str | None = None,
) -> Tensor:
    """See :func:`kernels.projection.reference.packed_key_value`."""
    return BACKENDS[backend or backend_for(x, wkv)].packed_key_value(x, wkv, norm, cos, sin, eps, layout)


def grouped_output(
    mixed: Tensor, cos: Tensor, sin: Tensor, wo_a: Tensor, wo_b: Tensor, backend: str | None = None
) -> Tensor:
    """See :func:`kernels.projection.reference.grouped_output`."""
    return BACKENDS[backend or backend_for(mixed, wo_a, wo_b)].grouped_output(mixed, cos, sin, wo_a, wo_b)


def index_query(
    latent: Tensor, wq_b: Tensor, cos: Tensor, sin: Tensor, heads: int, backend: str | None = None
) -> Tensor:
    """See :func:`kernels.projection.reference.index_query`."""
    return BACKENDS[backend or backend_for(latent, wq_b)].index_query(latent, wq_b, cos, sin, heads)


__all__ = ["BACKENDS", "backend_for", "grouped_output", "index_query", "key_value", "latent_query", "packed_key_value"]
