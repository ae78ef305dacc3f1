"""Projections of an attention layer: matrix products fused with normalization and rotation (report 2.3.1).

The ``cpu`` backend serves few tokens by one native operator per projection. The ``reference`` backend is a composition
of other operations, each of which selects its own backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import linear, native
from kernels.backends import get_backend
from kernels.cache_io import EntryLayout
from kernels.projection import cpu, reference
from kernels.projection.reference import key_value

__all__ = ["BACKENDS", "backend_for", "grouped_output", "index_query", "key_value", "latent_query", "packed_key_value"]

BACKENDS = {"reference": reference, "cpu": cpu}


def backend_for(x: Tensor, *weights: Tensor) -> str:
    """Return the backend for tokens x [B, S, ...] and the weights of a projection."""
    is_small = x.shape[0] * x.shape[1] <= linear.MAX_NATIVE_TOKENS
    is_supported = all(map(linear.supports_weight, weights)) and not torch.is_autocast_enabled("cpu")
    return "cpu" if is_small and is_supported and native.serves(x) else "reference"


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
    """Return the normalized latent [B, S, rank] and the normalized, rotated queries [B, S, heads, c].

    Args:
        x: [B, S, hidden]. The ``cpu`` backend requires float32 and disabled gradients.
        wq_a: [rank, hidden], the down-projection.
        norm: float32 [rank], the weight of the latent's RMS norm. Queries are normalized per head without a weight.
        wq_b: [heads * c, rank], the up-projection.
        cos: float32 [B or 1, S, r], as in :func:`kernels.rotary.rotate`.
        sin: float32 [B or 1, S, r].
        heads: Number of query heads.
        eps: Added to the mean squares.
    """
    return get_backend(BACKENDS, backend or backend_for(x, wq_a, wq_b)).latent_query(
        x, wq_a, norm, wq_b, cos, sin, heads, eps
    )


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
    """Return :func:`key_value` packed for the cache: uint8 [B, S, layout.nbytes]. No gradient."""
    return get_backend(BACKENDS, backend or backend_for(x, wkv)).packed_key_value(x, wkv, norm, cos, sin, eps, layout)


def grouped_output(
    attended: Tensor, cos: Tensor, sin: Tensor, wo_a: Tensor, wo_b: Tensor, backend: str | None = None
) -> Tensor:
    """Project the outputs of all heads back to the hidden size, by a grouped low-rank product.

    Args:
        attended: [B, S, H, c], the heads' outputs.
        cos: float32 [B or 1, S, r], as in :func:`kernels.rotary.rotate`.
        sin: float32 [B or 1, S, r].
        wo_a: [g, rank, H / g * c], the down-projection of every group of heads.
        wo_b: [hidden, g * rank], the joint up-projection.

    Returns:
        [B, S, hidden].
    """
    return get_backend(BACKENDS, backend or backend_for(attended, wo_a, wo_b)).grouped_output(
        attended, cos, sin, wo_a, wo_b
    )


def index_query(
    latent: Tensor, wq_b: Tensor, cos: Tensor, sin: Tensor, heads: int, backend: str | None = None
) -> Tensor:
    """Return the queries of the lightning indexer, rotated by position and by the Hadamard matrix.

    Args:
        latent: [B, S, rank], from :func:`latent_query`.
        wq_b: [heads * c, rank].
        cos: float32 [B or 1, S, r], as in :func:`kernels.rotary.rotate`.
        sin: float32 [B or 1, S, r].
        heads: Number of indexer heads.

    Returns:
        [B, S, heads, c].
    """
    return get_backend(BACKENDS, backend or backend_for(latent, wq_b)).index_query(latent, wq_b, cos, sin, heads)
