"""The routing of tokens to experts, their rows on the way there, and the sums of what comes back.

``written_out.py`` dispatches and combines. Routes, and the experts of a few tokens, are native operators on a CPU
without gradients (``cpu.cpp``). ``backend="reference"`` is the readable twin of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.expert_dispatch import cpu, reference, written_out
from kernels.expert_dispatch.reference import Dispatch, by_expert
from kernels.linear import FEW_TOKENS, is_stored_plainly

BACKENDS = {"reference": reference, "written_out": written_out}


def dispatch(x: Tensor, to: Dispatch, dtype: torch.dtype, backend: str = "written_out") -> Tensor:
    """See :func:`kernels.expert_dispatch.reference.dispatch`."""
    return BACKENDS[backend].dispatch(x, to, dtype)


def combine(rows: Tensor, to: Dispatch, dtype: torch.dtype, backend: str = "written_out") -> Tensor:
    """See :func:`kernels.expert_dispatch.reference.combine`."""
    return BACKENDS[backend].combine(rows, to, dtype)


def route(
    logits: Tensor, bias: Tensor, k: int, scale: float, chosen: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`kernels.expert_dispatch.reference.route`."""
    runs = "cpu" if native.serves(logits) else "reference"
    return (cpu if (backend or runs) == "cpu" else reference).route(logits, bias, k, scale, chosen)


def takes_few(x: Tensor, w1: Tensor) -> bool:
    """Return whether :func:`few_tokens` serves x [..., d]: a native operator, bound by reading the experts' weights."""
    few = x.numel() <= FEW_TOKENS * x.shape[-1]
    return few and is_stored_plainly(w1) and not torch.is_autocast_enabled("cpu") and native.serves(x)


def few_tokens(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    stacks: tuple[Tensor, ...],
    shared: tuple[Tensor, ...],
    limit: float,
) -> Tensor:
    """See :func:`kernels.expert_dispatch.reference.few_tokens`. Call it where :func:`takes_few`."""
    return cpu.few_tokens(x, chosen, weights, stacks, shared, limit)


__all__ = ["BACKENDS", "Dispatch", "by_expert", "combine", "dispatch", "few_tokens", "route", "takes_few"]
