"""Sampling of one token per row of logits: greedy, or by inversion of the cumulative distribution."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.sampling import cpu, reference

__all__ = ["BACKENDS", "backend_for", "sample"]

BACKENDS = {"reference": reference, "cpu": cpu}


def backend_for(logits: Tensor) -> str:
    """Return the backend for logits."""
    return "cpu" if native.serves(logits) else "reference"


def sample(
    logits: Tensor,
    uniform: Sequence[float],
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
    backend: str | None = None,
) -> list[int]:
    """Sample a token from every row of logits. A row's token depends on the values for this row only.

    Probabilities are computed in float64. A row with ``temperature`` 0 gets its most likely token. Others draw from the
    tokens that are left after ``top_k``, then ``top_p``, then ``min_p``; the most likely one always is.

    Args:
        logits: float32 [B, V]. The ``cpu`` backend requires disabled gradients.
        uniform: B random numbers in [0, 1). Not used at temperature 0.
        temperature: B values >= 0.
        top_k: B numbers of tokens to keep; 0 keeps all.
        top_p: B probabilities. The most likely tokens are kept until their probabilities sum to at least this.
        min_p: B probabilities relative to that of the most likely token.

    Returns:
        B token IDs; -1 for a row with NaN or without a finite largest logit.
    """
    module = get_backend(BACKENDS, backend or backend_for(logits))
    return module.sample(logits, uniform, temperature, top_k, top_p, min_p)
