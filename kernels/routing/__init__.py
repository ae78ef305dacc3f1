"""Routing of tokens to experts (report 2.1; bias as in V3 report 2.1.2)."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.routing import cpu, reference

__all__ = ["BACKENDS", "backend_for", "route"]

BACKENDS = {"reference": reference, "cpu": cpu}


def backend_for(logits: Tensor) -> str:
    """Return the backend for logits."""
    return "cpu" if native.serves(logits) else "reference"


def route(
    logits: Tensor, bias: Tensor, k: int, scale: float, chosen: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the experts of every token and compute their weights.

    The affinity of an expert is ``sqrt(softplus(logit))``. Weights are the affinities of the chosen experts, divided by
    their sum and multiplied by ``scale``.

    Args:
        logits: float32 [..., E]. The ``cpu`` backend requires disabled gradients.
        bias: float32 [E], added to the affinities for the choice alone.
        k: Experts per token.
        scale: Factor of the weights.
        chosen: int64 [..., k], experts chosen in advance; or None.

    Returns:
        The chosen experts, int64 [..., k], and their weights, float32 [..., k].

    Raises:
        IndexError: If ``chosen`` names an expert that does not exist (``cpu``; PyTorch raises RuntimeError on a CPU).
    """
    return get_backend(BACKENDS, backend or backend_for(logits)).route(logits, bias, k, scale, chosen)
