"""Experts in PyTorch. Copies the weights of every choice."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cache_io import EntryLayout
from kernels.cache_io.reference import unpack
from kernels.swiglu.reference import swiglu


def fused_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    stacks: tuple[Tensor, ...],
    shared: tuple[Tensor, ...],
    limit: float,
) -> Tensor:
    """Implement :func:`kernels.fused_experts.fused_experts`."""
    d = x.shape[-1]
    w1, w3, w2 = (w[chosen] for w in _unpack_all(stacks, d))
    gate, up = (torch.einsum("...d,...kid->...ki", x, w) for w in (w1, w3))
    out = torch.einsum("...ki,...kdi->...d", swiglu(gate, up, limit, weights.unsqueeze(-1)), w2)
    if shared:
        w1, w3, w2 = _unpack_all(shared, d)
        out = out + swiglu(x @ w1.t(), x @ w3.t(), limit) @ w2.t()
    return out


def _unpack_all(matrices: tuple[Tensor, ...], d: int) -> tuple[Tensor, ...]:
    """Return w1, w3 [..., inner, d] and w2 [..., d, inner] in float32."""
    w1, w3, w2 = matrices
    return _to_float(w1, d), _to_float(w3, d), _to_float(w2, w1.shape[-2])


def _to_float(weight: Tensor, inputs: int) -> Tensor:
    return unpack(weight, EntryLayout(inputs, "fp4")) if weight.dtype == torch.uint8 else weight.float()
