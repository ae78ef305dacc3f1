"""A loss whose gradients are computed in its forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.entry_ranges import EntryRanges


def wants_gradients(*inputs: Tensor) -> bool:
    """Return whether a backward pass can follow."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def mean(
    total: Tensor,
    inputs: tuple[Tensor, ...],
    gradients: list[Tensor],
    visible: EntryRanges,
    chosen: Tensor | None,
) -> Tensor:
    """Return the mean of a sum over queries, of those that have a permitted entry.

    ``gradients`` are those of the sum with respect to ``inputs``, or empty if no backward pass follows.
    """
    B, S = inputs[0].shape[:2]
    counted = (visible.first < visible.end).expand(B, S) if chosen is None else (chosen >= 0).any(-1)
    share = counted.sum().clamp(min=1).reciprocal()
    if not gradients:
        return total * share
    return _Precomputed.apply(total * share, [g.mul_(share) for g in gradients], *inputs)


class _Precomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, gradients, *inputs):
        ctx.save_for_backward(*(g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)))
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        return None, None, *(gradient * upstream for gradient in ctx.saved_tensors)
