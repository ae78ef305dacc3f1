"""Scores of the lightning indexer for whole sequences (report eq. 13-16)."""

from __future__ import annotations

from torch import Tensor

from kernels.backends import get_backend
from kernels.index_scores import eager, reference

__all__ = ["BACKENDS", "backend_for", "index_scores"]

BACKENDS = {"reference": reference, "eager": eager}


def backend_for(query: Tensor) -> str:
    """Return the backend for query: ``eager`` on any device."""
    return "eager"


def index_scores(
    query: Tensor,
    keys: Tensor,
    head_weights: Tensor,
    permitted: Tensor | None = None,
    chosen: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``I[b, s, t] = sum_h head_weights[b, s, h] * relu(query[b, s, h] . keys[b, t])``; differentiable.

    Scores are float32 under autocast as well. Otherwise training and inference would select different entries.

    Args:
        query: [B, S, h, c].
        keys: [B, T, c].
        head_weights: [B, S, h], already scaled.
        permitted: bool [B or 1, S, T] or None. Scores where it is False are undefined.
        chosen: int [B, S, K], the keys to score for every query, -1 in unused slots, whose scores are undefined; or
            None to score all keys.

    Returns:
        float32 [B, S, T], or [B, S, K] with ``chosen``.
    """
    scores = get_backend(BACKENDS, backend or backend_for(query)).index_scores
    return scores(query, keys, head_weights, permitted, chosen)
