"""Cases of benchmarks.kernels: the indexer's loss, with the attention mass that it learns from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.lib.kernel_case import Case, Sizes, gradients
from kernels.entry_ranges import EntryRanges
from kernels.indexer_kl import indexer_kl
from kernels.quantize import round_to_format
from kernels.sparse_attention import EntryMass, sparse_attention


def indexer_losses(s: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the loss over all visible entries and over chosen ones. ``dtype`` is that of the attention's operands."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    entries = max(s.chosen, s.tokens // 4)
    attended = [
        x.to(dtype)
        for x in (random(1, s.tokens, s.heads, s.dims), random(1, s.tokens, s.dims), random(1, entries, s.dims))
    ]
    sink = random(s.heads)
    index = [
        *(
            round_to_format(random(*shape), "fp4", backend="reference")
            for shape in ((1, s.tokens, s.index_heads, s.index_dims), (1, entries, s.index_dims))
        ),
        random(1, s.tokens, s.index_heads) * (s.index_heads * s.index_dims) ** -0.5,
    ]
    end = ((torch.arange(s.tokens, device=device) + 1) * entries // s.tokens).unsqueeze(0)
    visible = EntryRanges(torch.zeros_like(end), end)
    some = torch.rand(1, s.tokens, entries, device=device).topk(s.chosen).indices
    some = some.masked_fill(torch.rand(some.shape, device=device) < 0.01, -1)

    def mass_of(part: int, chosen: Tensor | None, backend: str, dtype: torch.dtype) -> EntryMass:
        n = s.tokens // part
        query, window_kv, pool = (x.to(dtype) for x in attended)
        with torch.no_grad():
            _, mass = sparse_attention(
                query[:, :n], window_kv[:, :n], pool, visible.of(slice(n)), sink.to(dtype), s.window,
                chosen=None if chosen is None else chosen[:, :n], backend=backend,
            )  # fmt: skip
        assert mass is not None
        return mass

    def loss(
        part: int, chosen: Tensor | None, backend: str, mass: Callable[[], EntryMass], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        n = s.tokens // part
        query, keys, weights = index
        own = None if chosen is None else chosen[:, :n]
        return gradients(
            lambda *leaves: indexer_kl(*leaves, mass(), visible.of(slice(n)), own, backend),
            [query[:, :n], keys, weights[:, :n]],
            torch.ones((), device=device),
            dtype,
        )

    for kind, chosen, pairs in (
        ("all entries", None, float(end.sum())),
        ("chosen entries", some, float(s.tokens * s.chosen)),
    ):
        # The Triton backend computes the mass again in every call, and PyTorch's operators the attention.
        streamed = functools.cache(functools.partial(mass_of, 1, chosen, "triton", dtype))
        yield Case(
            f"indexer_kl forward + backward, {kind}",
            lambda chosen=chosen, mass=streamed: loss(1, chosen, "triton", mass, torch.float32),
            lambda chosen=chosen: loss(
                s.share, chosen, "reference", lambda: mass_of(s.share, chosen, "reference", dtype), torch.float32
            ),
            lambda chosen=chosen: loss(
                1, chosen, "reference", lambda: mass_of(1, chosen, "reference", torch.float64), torch.float64
            ),
            pairs * (2.0 * s.heads * s.dims + 6.0 * s.index_heads * s.index_dims),
            target="45% of the products' ceiling",
            share=s.share,
            tolerance=0.02,
        )
