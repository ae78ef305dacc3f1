"""Sampling in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    uniform: Sequence[float],
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
) -> list[int]:
    """Implement :func:`kernels.sampling.sample`."""
    vocab = logits.shape[-1]
    largest, likeliest = logits.max(dim=-1)
    tokens: list[int] = torch.where(largest.isfinite(), likeliest, -1).tolist()
    drawn = [i for i, token in enumerate(tokens) if token >= 0 and temperature[i] > 0]
    is_truncated = [p < 1 or least > 0 or 0 < k < vocab for p, least, k in zip(top_p, min_p, top_k)]
    truncated = [i for i in drawn if is_truncated[i]]
    for rows in ([i for i in drawn if not is_truncated[i]], truncated):
        if not rows:
            continue

        def column(values: Sequence[float], rows: list[int] = rows) -> Tensor:
            return torch.tensor([[values[i]] for i in rows], dtype=torch.float64, device=logits.device)

        # A tiny temperature would be 0 in float32. Subtracting the maximum first keeps the quotient finite.
        scaled = logits[rows].double()
        probabilities = ((scaled - scaled.amax(-1, keepdim=True)) / column(temperature)).softmax(-1)
        ids = None
        if rows is truncated:
            probabilities, ids = probabilities.sort(dim=-1, descending=True, stable=True)
            probabilities = _truncate(probabilities, column(top_k), column(top_p), column(min_p))
        found = _invert(probabilities, column(uniform))
        for i, token in zip(rows, (found if ids is None else ids.gather(1, found))[:, 0].tolist()):
            tokens[i] = token
    return tokens


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return the positions [B, 1] in probabilities [B, V] whose intervals hold ``uniform`` [B, 1] of the total."""
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Below the total, so that the token found has a positive probability.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)


def _truncate(probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Zero the probabilities [B, V], in descending order, of tokens that the settings [B, 1] exclude."""
    rank = torch.arange(probabilities.shape[-1], device=probabilities.device)
    probabilities = probabilities.masked_fill((rank >= top_k) & (top_k > 0), 0.0)
    before = probabilities.cumsum(dim=-1) - probabilities
    keep = (before < top_p * probabilities.sum(-1, keepdim=True)) | (top_p >= 1)
    keep &= probabilities >= min_p * probabilities[:, :1]
    keep[:, 0] = True
    return probabilities.masked_fill(~keep, 0.0)
