"""Attention within whole sequences, for CPUs, by blocks of queries.

A block multiplies only with the keys of its window and with the entries up to the last one that any of its queries may
see. Scores stay in the cache and are recomputed in the backward pass. Memory thus grows neither with S * window nor
with S * T, except for the mask and the returned mass. All heads share a key, so that the scores of a block are a single
product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.autocast import in_float32, product_dtype
from kernels.sparse_attention import blocks

_MAX_SCORES = 1 << 20
"""Maximum number of scores per block of several queries: 4 MiB, about the size of a second-level cache."""
_MAX_QUERIES = 128
"""Maximum number of queries per block."""


def sparse_attention(
    query: Tensor,
    window_kv: Tensor | None,
    entries: Tensor | None,
    entry_mask: Tensor | None,
    sink: Tensor,
    window: int,
    reach: Tensor | None,
    scale: float,
    value_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Implement :func:`kernels.sparse_attention.sparse_attention` without past tokens, for entries [B, T, c].

    Under autocast only the products have its dtype.
    """
    if entries is None or entry_mask is None or not entries.shape[1]:
        entries = entry_mask = None
    dtype = product_dtype(query) if torch.is_autocast_enabled(query.device.type) else torch.float32
    with in_float32(query):
        return _Attention.apply(query, window_kv, entries, sink, entry_mask, window, reach, dtype, scale, value_size)


@dataclass(frozen=True)
class _Block:
    """Queries ``begin`` to ``end``, tokens ``oldest`` to ``end`` (none if equal), and the first ``entries`` entries."""

    begin: int
    end: int
    oldest: int
    entries: int

    @property
    def tokens(self) -> int:
        return self.end - self.oldest

    def keys(self, window_kv: Tensor | None, entries: Tensor | None) -> Tensor:
        """Return the keys of the block, tokens before entries: [B, keys, c]."""
        if window_kv is None:
            assert entries is not None
            return entries[:, : self.entries]
        near = window_kv[:, self.oldest : self.end]
        return torch.cat((near, entries[:, : self.entries]), dim=1) if entries is not None and self.entries else near

    def bias(self, window: int, entry_mask: Tensor | None, reach: Tensor | None) -> Tensor:
        """Return the additive mask, 0 or -inf: float32 [B or 1, queries, 1, keys]."""
        age = torch.arange(self.begin, self.end).unsqueeze(1) - torch.arange(self.oldest, self.end)
        age = age.unsqueeze(0)
        limit: int | Tensor = window
        if reach is not None:
            limit = reach[:, self.begin : self.end, None].clamp(max=window)
        hidden = (age < 0) | (age >= limit)
        if entry_mask is not None and self.entries:
            far = ~entry_mask[:, self.begin : self.end, : self.entries]
            B = max(len(hidden), len(far))
            hidden = torch.cat((hidden.expand(B, -1, -1), far.expand(B, -1, -1)), dim=-1)
        return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")).unsqueeze(2)


def _blocks(query: Tensor, window: int, entry_mask: Tensor | None) -> Iterator[_Block]:
    """Yield consecutive blocks of queries."""
    B, S, H, _ = query.shape
    last = torch.zeros(S, dtype=torch.int64)
    if entry_mask is not None:
        last = (entry_mask.any(0) * torch.arange(1, entry_mask.shape[-1] + 1)).amax(-1)
    begin = 0
    while begin < S:
        keys = window + int(last[begin : begin + _MAX_QUERIES].max()) + _MAX_QUERIES
        end = min(S, begin + max(1, min(_MAX_QUERIES, _MAX_SCORES // (B * H * keys))))
        yield _Block(begin, end, max(0, begin - window + 1) if window else end, int(last[begin:end].max()))
        begin = end


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, window_kv, entries, sink, entry_mask, window, reach, dtype, scale, value_size):
        ctx.window, ctx.scale = window, scale
        # Queries are scaled so that logits have base 2.
        scaled = (query * (scale * blocks.LOG2_E)).to(dtype)
        near, far = (None if x is None else x.to(dtype) for x in (window_kv, entries))
        sink = sink * blocks.LOG2_E
        out = query.new_empty(*query.shape[:3], value_size, dtype=torch.float32)
        log_sum = query.new_empty(query.shape[:3], dtype=torch.float32)
        mass = None if entries is None else query.new_zeros(*query.shape[:2], entries.shape[1], dtype=torch.float32)
        for block in _blocks(query, window, entry_mask):
            rows, keys = slice(block.begin, block.end), block.keys(near, far)
            bias = block.bias(window, entry_mask, reach)
            out[:, rows], weights, total, log_sum[:, rows] = blocks.attend(
                scaled[:, rows], keys, bias, sink, value_size
            )
            if mass is not None and block.entries:
                mass[:, rows, : block.entries] = blocks.mass(weights[..., block.tokens :], total)
        ctx.dtypes = [None if x is None else x.dtype for x in (query, window_kv, entries)]
        ctx.save_for_backward(scaled, near, far, sink, entry_mask, reach, out.to(dtype), log_sum)
        if mass is not None:
            ctx.mark_non_differentiable(mass)
        return out, mass

    @staticmethod
    def backward(ctx, grad_out, _):
        scaled, near, far, sink, entry_mask, reach, out, log_sum = ctx.saved_tensors
        upstream = grad_out.to(scaled.dtype)
        inner = (grad_out * out).sum(-1)
        grad_sink = -((sink - log_sum).exp2() * inner).sum((0, 1))
        grad_query = torch.empty_like(scaled, dtype=torch.float32)
        grad_kv, grad_entries = (None if x is None else torch.zeros_like(x, dtype=torch.float32) for x in (near, far))
        for block in _blocks(scaled, ctx.window, entry_mask):
            rows, keys = slice(block.begin, block.end), block.keys(near, far)
            bias = block.bias(ctx.window, entry_mask, reach)
            grad_query[:, rows], grad_keys = blocks.gradients(
                scaled[:, rows], keys, bias, log_sum[:, rows], upstream[:, rows], inner[:, rows]
            )
            if grad_kv is not None:
                grad_kv[:, block.oldest : block.end] += grad_keys[:, : block.tokens]
            if grad_entries is not None and block.entries:
                grad_entries[:, : block.entries] += grad_keys[:, block.tokens :]
        grad_query *= ctx.scale
        gradients = zip((grad_query, grad_kv, grad_entries), ctx.dtypes)
        return *(None if g is None else g.to(dtype) for g, dtype in gradients), grad_sink, *[None] * 6
