"""Lightning indexer: score compressed entries against a query and pick the best.

Whole sequences are scored in blocks on a CPU (``blocked.py``), elsewhere as written in ``reference.py``. A cache's keys
are scored by a native operator on a CPU (``cpu.cpp``), tile by tile elsewhere (``streamed.py``). ``backend=`` forces
one; :func:`backend_for` and :func:`cached_backend_for` tell which one runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.cache_io import EntryLayout, Pages
from kernels.index_topk import blocked, cpu, reference, streamed
from kernels.index_topk.reference import select_topk

BACKENDS = {"reference": reference, "blocked": blocked}
CACHED_BACKENDS = {"streamed": streamed, "cpu": cpu}


def backend_for(query: Tensor) -> str:
    return "blocked" if query.device.type == "cpu" else "reference"


def index_scores(
    query: Tensor, keys: Tensor, head_weights: Tensor, permitted: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """See :func:`kernels.index_topk.reference.index_scores`."""
    return BACKENDS[backend or backend_for(query)].index_scores(query, keys, head_weights, permitted)


def cached_backend_for(query: Tensor) -> str:
    return "cpu" if query.is_cpu and native.level() is not None else "streamed"


def index_topk(
    query: Tensor,
    keys: Pages,
    layout: EntryLayout,
    head_weights: Tensor,
    visible: Tensor,
    k: int,
    dtype: torch.dtype = torch.float32,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Tensor:
    """See :func:`kernels.index_topk.streamed.index_topk`."""
    chosen = CACHED_BACKENDS[backend or cached_backend_for(query)]
    return chosen.index_topk(query, keys, layout, head_weights, visible, k, dtype, batch_invariant)


__all__ = [
    "BACKENDS",
    "CACHED_BACKENDS",
    "backend_for",
    "cached_backend_for",
    "index_scores",
    "index_topk",
    "select_topk",
]
