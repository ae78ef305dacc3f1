"""The lightning indexer: score compressed entries against a query and pick the best.

Whole sequences are scored in blocks on a CPU (``blocked.py``), elsewhere as written in ``reference.py``; a cache's keys
as in ``streamed.py``. ``backend=`` chooses by hand and :func:`backend_for` tells which one runs.
"""

from __future__ import annotations

from torch import Tensor

from kernels.index_topk import blocked, reference
from kernels.index_topk.reference import select_topk
from kernels.index_topk.streamed import best_visible, index_topk, tile_scores

BACKENDS = {"reference": reference, "blocked": blocked}


def backend_for(query: Tensor) -> str:
    return "blocked" if query.device.type == "cpu" else "reference"


def index_scores(
    query: Tensor, keys: Tensor, head_weights: Tensor, permitted: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """See :func:`kernels.index_topk.reference.index_scores`."""
    return BACKENDS[backend or backend_for(query)].index_scores(query, keys, head_weights, permitted)


__all__ = ["BACKENDS", "backend_for", "best_visible", "index_scores", "index_topk", "select_topk", "tile_scores"]
