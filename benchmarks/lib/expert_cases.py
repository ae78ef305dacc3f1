"""Cases of benchmarks.kernels: experts over uneven numbers of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.lib.kernel_case import Case, Sizes, gradients
from kernels.expert_dispatch import by_expert, run_experts

_LIMIT = 1e3
"""Bound of the SwiGLU that no input is near: rounding would decide whether it passes a gradient."""


def experts(s: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield all products of the experts, forward alone and with their gradients. The first experts have most rows."""
    inner = max(1, s.width // 2)
    chosen = (torch.rand(s.expert_rows, 1, device=device).square() * s.experts).long()
    plan = by_expert(chosen, s.experts)
    rows = torch.randn(s.expert_rows, s.width, device=device)
    gains = torch.rand(s.expert_rows, 1, device=device)
    shapes = (s.experts, inner, s.width), (s.experts, inner, s.width), (s.experts, s.width, inner)
    stacks = [torch.randn(shape, device=device) * shape[-1] ** -0.5 for shape in shapes]
    given = [x.to(dtype) for x in (rows, gains, *stacks)]
    upstream = torch.randn(rows.shape, device=device).to(dtype)

    def run(backend: str, dtype: torch.dtype = dtype) -> Tensor:
        with torch.no_grad():
            rows, gains, w1, w3, w2 = (x.to(dtype) for x in given)
            return run_experts(rows, gains, (w1, w3, w2), plan, _LIMIT, backend)

    def both(backend: str, dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
        def call(rows: Tensor, gains: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
            return run_experts(rows, gains, (w1, w3, w2), plan, _LIMIT, backend)

        return gradients(call, given, upstream, dtype)

    flops = 3 * 2.0 * s.expert_rows * s.width * inner
    for kind, function, work in (("forward", run, flops), ("forward + backward", both, 3 * flops)):
        yield Case(
            f"expert_dispatch {kind}",
            lambda function=function: function("triton"),
            lambda function=function: function("eager"),
            lambda function=function: function("reference", torch.float64),
            flops=work,
            tolerance=0.02,
            target="60% of the products' ceiling",
        )
