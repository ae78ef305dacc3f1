"""Cases of benchmarks.kernels: the recurrent mixers' scans."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib.kernel_case import Case, Sizes, gradients
from kernels.gated_delta_rule import gated_delta_rule
from kernels.ssd_scan import ssd_scan


def scans(s: Sizes, device: torch.device) -> Iterator[Case]:
    """Yield the scans, forward alone and with their gradients. The PyTorch operators are those of the eager backend."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, s.scan_tokens, *shape, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(1, s.scan_tokens, *shape, device=device)

    n, heads = s.scan_dims, s.scan_heads
    groups = [normal(1, n) for _ in range(2)]
    rates = -0.1 - torch.rand(heads, device=device)
    given = [normal(heads, n // 2), uniform(heads), rates, *groups, torch.randn(heads, device=device)]
    yield from _scan("ssd_scan", ssd_scan, given, given[0].shape)

    heads = max(1, heads // 2)
    q, k, v = (F.normalize(normal(heads, n), dim=-1) for _ in range(3))
    given = [q, k, v, -0.1 * uniform(heads, n), uniform(heads)]
    yield from _scan("gated_delta_rule", gated_delta_rule, given, v.shape)


def _scan(
    name: str, scan: Callable[..., tuple[Tensor, Tensor]], given: list[Tensor], shape: torch.Size
) -> Iterator[Case]:
    upstream = torch.randn(shape, device=given[0].device)

    def call(backend: str) -> Callable[..., Tensor]:
        return lambda *tensors: scan(*tensors, backend=backend)[0]

    def forward(backend: str, dtype: torch.dtype = torch.float32) -> Tensor:
        with torch.no_grad():
            return call(backend)(*(x.to(dtype) for x in given))

    def both(backend: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return gradients(call(backend), given, upstream, dtype)

    read, written = 4.0 * sum(x.numel() for x in given), 4.0 * upstream.numel()
    for kind, run, nbytes in (
        ("forward", forward, read + written),
        ("forward + backward", both, 3 * read + 2 * written),
    ):
        yield Case(
            f"{name} {kind}",
            lambda run=run: run("triton"),
            lambda run=run: run("eager"),
            lambda run=run: run("reference", torch.float64),
            nbytes=nbytes,
            tolerance=1e-4,
            target="speed of flash-linear-attention",
        )
