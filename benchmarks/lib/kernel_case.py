"""Sizes and form of the cases of benchmarks.kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Sizes of the cases: those of DeepSeek-V4-Flash, or tiny ones for a rehearsal."""

    tokens: int = 4096
    heads: int = 64
    dims: int = 512
    rope: int = 64
    chosen: int = 512
    window: int = 128
    entries: int = 32768
    index_heads: int = 64
    index_dims: int = 128
    index_queries: int = 2048
    context: int = 1 << 20
    batch: int = 16
    rows: int = 65536
    width: int = 4096
    matrix: int = 2048
    matrices: int = 16
    scan_tokens: int = 32768
    scan_heads: int = 64
    scan_dims: int = 128
    expert_rows: int = 49152
    experts: int = 64
    share: int = 16
    """The reference runs on one of so many queries, and its time is multiplied."""

    def checked(self) -> Sizes:
        """Return the sizes for the comparison with float64."""
        return replace(
            self,
            tokens=min(self.tokens, 64),
            entries=min(self.entries, 4096),
            index_queries=min(self.index_queries, 16),
            context=min(self.context, 1 << 16),
            batch=min(self.batch, 2),
            rows=min(self.rows, 512),
            width=min(self.width, 512),
            matrix=min(self.matrix, 600),
            matrices=min(self.matrices, 2),
            scan_tokens=min(self.scan_tokens, 300),
            scan_heads=min(self.scan_heads, 4),
            expert_rows=min(self.expert_rows, 300),
            experts=min(self.experts, 8),
            share=1,
        )


TINY = Sizes(
    tokens=4,
    heads=2,
    dims=32,
    rope=4,
    chosen=5,
    window=6,
    entries=40,
    index_heads=2,
    index_dims=16,
    index_queries=3,
    context=512,
    batch=1,
    rows=5,
    width=20,
    matrix=20,
    matrices=2,
    scan_tokens=17,
    scan_heads=2,
    scan_dims=6,
    expert_rows=19,
    experts=3,
    share=1,
)


@dataclass(frozen=True)
class Case:
    """One kernel on one set of random inputs."""

    name: str
    run: Callable[[], object]
    """Runs the Triton backend. Returns a tensor or a tuple of tensors."""
    reference: Callable[[], object]
    """Runs PyTorch operators on ``1 / share`` of the queries."""
    exact: Callable[[], object]
    """Returns the float64 results of all queries, in the order of ``run``."""
    flops: float = 0.0
    nbytes: float = 0.0
    share: int = 1
    tolerance: float = 0.0
    """Largest relative error, in the norm; 0 for equal results."""
    target: str = ""


def gradients(
    call: Callable[..., Tensor], given: list[Tensor], upstream: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return the output of ``call`` and the gradients of its inputs, all in ``dtype``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in given]
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))
