"""Attention within whole sequences, for CPUs, by blocks of queries.

A block multiplies only with the keys of its window and with the entries up to the last one that any of its queries may
see. Scores stay in the cache and are recomputed in the backward pass. Memory thus grows neither with S * window nor
with S * T, except for the returned mass. All heads share a key, so that the scores of a block are a single product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.autocast import in_float32, product_dtype

_SCORES = 1 << 20
"""Most scores of a block of several queries: 4 MiB, about the size of a second-level cache."""
_QUERIES = 128
"""Most queries of a block."""
_LOG2_E = math.log2(math.e)
"""Factor of logits for a softmax to base 2. On a CPU, exp(-inf) is 25 times slower than exp of finite values, but
exp2(-inf) is not."""


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
        keys = window + int(last[begin : begin + _QUERIES].max()) + _QUERIES
        end = min(S, begin + max(1, min(_QUERIES, _SCORES // (B * H * keys))))
        yield _Block(begin, end, max(0, begin - window + 1) if window else end, int(last[begin:end].max()))
        begin = end


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, window_kv, entries, sink, entry_mask, window, reach, dtype, scale, value_size):
        ctx.window, ctx.dtype, ctx.scale, ctx.value_size = window, dtype, scale, value_size
        # Queries are scaled so that logits have base 2.
        scaled = (query * (scale * _LOG2_E)).to(dtype)
        near, far = (None if x is None else x.to(dtype) for x in (window_kv, entries))
        sink = sink * _LOG2_E
        out = query.new_empty(*query.shape[:3], value_size, dtype=torch.float32)
        log_sum = query.new_empty(query.shape[:3], dtype=torch.float32)
        mass = None if entries is None else query.new_zeros(*query.shape[:2], entries.shape[1], dtype=torch.float32)
        for block in _blocks(query, window, entry_mask):
            rows, keys = slice(block.begin, block.end), block.keys(near, far)
            logits = _logits(scaled[:, rows], keys).add_(block.bias(window, entry_mask, reach))
            peak = torch.maximum(logits.amax(-1), sink)
            weights = logits.sub_(peak.unsqueeze(-1)).exp2_()
            total = weights.sum(-1) + (sink - peak).exp2()
            log_sum[:, rows] = peak + total.log2()
            summed = torch.bmm(weights.to(dtype).flatten(1, 2), keys[..., :value_size]).view_as(out[:, rows])
            torch.div(summed, total.unsqueeze(-1), out=out[:, rows])
            if mass is not None and block.entries:
                beyond = weights[..., block.tokens :]
                mass[:, rows, : block.entries] = (total.reciprocal().unsqueeze(2) @ beyond).squeeze(2)
        ctx.dtypes = [None if x is None else x.dtype for x in (query, window_kv, entries)]
        ctx.save_for_backward(scaled, near, far, sink, entry_mask, reach, out.to(dtype), log_sum)
        if mass is not None:
            ctx.mark_non_differentiable(mass)
        return out, mass

    @staticmethod
    def backward(ctx, grad_out, _):
        scaled, near, far, sink, entry_mask, reach, out, log_sum = ctx.saved_tensors
        dtype, size = ctx.dtype, ctx.value_size
        upstream = grad_out.to(dtype)
        inner = (grad_out * out).sum(-1)
        grad_sink = -((sink - log_sum).exp2() * inner).sum((0, 1))
        grad_query = torch.empty_like(scaled, dtype=torch.float32)
        grad_kv, grad_entries = (None if x is None else torch.zeros_like(x, dtype=torch.float32) for x in (near, far))
        for block in _blocks(scaled, ctx.window, entry_mask):
            rows, keys = slice(block.begin, block.end), block.keys(near, far)
            logits = _logits(scaled[:, rows], keys).add_(block.bias(ctx.window, entry_mask, reach))
            weights = logits.sub_(log_sum[:, rows].unsqueeze(-1)).exp2_()
            flat = upstream[:, rows].flatten(1, 2)
            grad_keys = torch.bmm(weights.to(dtype).flatten(1, 2).transpose(1, 2), flat).float()
            grad_logits = _logits(upstream[:, rows], keys[..., :size]).sub_(inner[:, rows].unsqueeze(-1)).mul_(weights)
            narrow = grad_logits.to(dtype).flatten(1, 2)
            grad_query[:, rows] = torch.bmm(narrow, keys).view_as(scaled[:, rows])
            if size < keys.shape[-1]:  # so far the gradient of the values
                grad_keys = F.pad(grad_keys, (0, keys.shape[-1] - size))
            grad_keys.add_(torch.bmm(narrow.transpose(1, 2), scaled[:, rows].flatten(1, 2)), alpha=1 / _LOG2_E)
            if grad_kv is not None:
                grad_kv[:, block.oldest : block.end] += grad_keys[:, : block.tokens]
            if grad_entries is not None and block.entries:
                grad_entries[:, : block.entries] += grad_keys[:, block.tokens :]
        grad_query *= ctx.scale
        gradients = zip((grad_query, grad_kv, grad_entries), ctx.dtypes)
        return *(None if g is None else g.to(dtype) for g, dtype in gradients), grad_sink, *[None] * 6


def _logits(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the products of all heads as a new tensor, float32 [B, queries, H, keys]."""
    return torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2)).float().unflatten(1, queries.shape[1:3])
