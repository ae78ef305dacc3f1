"""Routes, dispatch to experts and combination, in eager PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.swiglu.reference import swiglu


class Dispatch(NamedTuple):
    """Which rows the experts get, one expert after the other, for N tokens that chose K experts each."""

    picks: Tensor
    """int64 [rows]: the place in the flattened choices [N * K] that a row stands for; -1 in rows that fill up."""
    places: Tensor
    """int64 [N, K]: the row of each choice."""
    tokens: Tensor
    """int64 [rows]: whose row it is. Rows that fill up are the first token's, and nobody combines them."""
    counts: list[int]
    """Rows of each expert."""


def by_expert(chosen: Tensor, experts: int, multiple: int = 1) -> Dispatch:
    """The rows for ``chosen``, int64 [N, K] out of ``experts``, filled up to a ``multiple`` for each."""
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    missing = -counts % multiple
    before = missing.cumsum(0) - missing
    sizes: list[int] = (counts + missing).tolist()
    picks, places = order.new_full((sum(sizes),), -1), torch.empty_like(order)
    filled = torch.arange(len(order), device=order.device) + before.repeat_interleave(counts)
    picks[filled] = order
    places[order] = filled
    return Dispatch(picks, places.view_as(chosen), picks.clamp(min=0) // chosen.shape[-1], sizes)


def route(logits: Tensor, bias: Tensor, k: int, scale: float, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts of every token and their weights, int64 and float32 [..., k], from logits float32 [..., E].

    Affinity is sqrt(softplus(logit)); the ``bias`` [E] takes part in the choice only (V3 report 2.1.2). ``chosen``
    int64 [..., k] replaces the choice. Weights are affinities normalized over the choice, times ``scale``.
    """
    affinity = F.softplus(logits).sqrt()
    if chosen is None:
        chosen = (affinity.detach() + bias).topk(k, dim=-1).indices
    weights = affinity.gather(-1, chosen)
    return chosen, weights / weights.sum(-1, keepdim=True) * scale


def few_tokens(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    stacks: tuple[Tensor, ...],
    shared: tuple[Tensor, ...],
    limit: float,
) -> Tensor:
    """Weighted sums of experts' SwiGLUs: x [..., d], chosen int64 [..., K], weights [..., K] and ``stacks`` w1 and w3
    [E, inner, d] and w2 [E, d, inner] -> float32 [..., d]. ``shared`` is empty, or w1, w3 and w2 of an expert that
    every token takes besides, with weight 1. Copies the weights of every choice."""
    w1, w3, w2 = (w[chosen].float() for w in stacks)
    gate, up = (torch.einsum("...d,...kid->...ki", x, w) for w in (w1, w3))
    out = torch.einsum("...ki,...kdi->...d", swiglu(gate, up, limit, weights.unsqueeze(-1)), w2)
    if shared:
        w1, w3, w2 = (w.float() for w in shared)
        out = out + swiglu(x @ w1.t(), x @ w3.t(), limit) @ w2.t()
    return out


def dispatch(x: Tensor, to: Dispatch, dtype: torch.dtype) -> Tensor:
    """Every row's token, from x [N, d]: [rows, d] in ``dtype``. What is done with rows that fill up has no gradient."""
    return x.to(dtype).index_select(0, to.tokens)


def combine(rows: Tensor, to: Dispatch, dtype: torch.dtype) -> Tensor:
    """Every token's sum over its rows, of rows [rows, d]: [N, d], summed up in ``dtype``.

    Rows that fill up are left out, and their gradient means nothing: it is to be stopped where the rows are made.
    """
    return rows.index_select(0, to.places.flatten()).unflatten(0, to.places.shape).sum(1, dtype=dtype)
