"""Routing of tokens to experts (V4 report 2.1; bias and groups as in V3 report 2.1.2 and its released code)."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.routing import cpu, reference
from kernels.routing.reference import SCORINGS, SUM_EPS, affinity

__all__ = ["BACKENDS", "SCORINGS", "SUM_EPS", "affinity", "backend_for", "route"]

BACKENDS = {"reference": reference, "cpu": cpu}


def backend_for(logits: Tensor) -> str:
    """Return the backend for logits."""
    return "cpu" if native.serves(logits) else "reference"


def route(
    logits: Tensor,
    bias: Tensor,
    k: int,
    scale: float,
    chosen: Tensor | None = None,
    scoring: str = "sqrtsoftplus",
    groups: int = 1,
    groups_per_token: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the experts of every token and compute their weights.

    The affinity of an expert is ``sqrt(softplus(logit))`` or ``sigmoid(logit)``. Weights are the affinities of the
    chosen experts, divided by their sum and multiplied by ``scale``. With fewer ``groups_per_token`` than ``groups``,
    the choice is limited to a token's best groups: those with the largest sum of their two best biased affinities.

    Args:
        logits: float32 [..., E]. The ``cpu`` backend requires disabled gradients.
        bias: float32 [E], added to the affinities for the choice alone.
        k: Experts per token.
        scale: Factor of the weights.
        chosen: int64 [..., k], experts chosen in advance; or None.
        scoring: A key of :data:`SCORINGS`.
        groups: Groups of E / groups consecutive experts, at least 2 each if there are several.
        groups_per_token: Groups that the experts of a token come from.

    Returns:
        The chosen experts, int64 [..., k], and their weights, float32 [..., k].

    Raises:
        KeyError: If the scoring is unknown.
        IndexError: If ``chosen`` names an expert that does not exist (``cpu``; PyTorch raises RuntimeError on a CPU).
    """
    if scoring not in SCORINGS:
        raise KeyError(f"route: unknown scoring '{scoring}'; choose one of {', '.join(SCORINGS)}")
    module = get_backend(BACKENDS, backend or backend_for(logits))
    return module.route(logits, bias, k, scale, chosen, scoring, groups, groups_per_token)
