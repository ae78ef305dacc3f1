"""mHC for CPUs: the reference's numbers with fewer passes over memory, forward and backward.

A batched product of thousands of 4 x 4 with 4 x d matrices is dispatched one by one by CPU libraries, which costs far
more than the arithmetic: here each pair of streams is one fused multiply-add over a block of tokens that stays in the
cache. The norm's and Sinkhorn's backward passes are written out, because what autograd would record for them re-reads
the streams several times and takes hundreds of small operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.hyper_connections.reference import weights_from_raw

_BLOCK_BYTES = 1 << 18
"""Bytes of one stream in a block: with the others it fits a second-level cache."""


_SINKHORN_TOKENS = 1024
"""Tokens whose n x n matrices are iterated together."""


def mixing_weights(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, S, n, d = streams.shape
    raw = _NormalizedProduct.apply(streams.reshape(B * S, n * d), fn, norm_eps)
    return weights_from_raw(raw, (B, S, n), scale, base, eps, lambda x: _Sinkhorn.apply(x, iterations, eps))


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    return _Collapse.apply(streams, pre)


def expand(streams: Tensor, comb: Tensor, post: Tensor, output: Tensor) -> Tensor:
    return _Expand.apply(streams, comb, post, output)


def _blocks(tokens: int, d: int) -> list[slice]:
    step = max(1, _BLOCK_BYTES // (4 * d))
    return [slice(i, min(i + step, tokens)) for i in range(0, tokens, step)]


def _weighted_sum(out: Tensor, weights: list[Tensor], rows: list[Tensor]) -> None:
    """out [N, d] <- sum of weights[i] [N, 1] * rows[i] [N, d]."""
    torch.mul(rows[0], weights[0], out=out)
    for weight, row in zip(weights[1:], rows[1:]):
        out.addcmul_(row, weight)


class _Collapse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams: Tensor, pre: Tensor) -> Tensor:
        ctx.save_for_backward(streams, pre)
        *lead, n, d = streams.shape
        x, w = streams.reshape(-1, n, d), pre.reshape(-1, n, 1)
        out = x.new_empty(x.shape[0], d)
        for s in _blocks(*out.shape):
            _weighted_sum(out[s], [w[s, j] for j in range(n)], [x[s, j] for j in range(n)])
        return out.view(*lead, d)

    @staticmethod
    def backward(ctx, grad: Tensor):
        streams, pre = ctx.saved_tensors
        *_, n, d = streams.shape
        x, w, g = streams.reshape(-1, n, d), pre.reshape(-1, n, 1), grad.reshape(-1, d)
        grad_x, grad_w = torch.empty_like(x), torch.empty_like(w)
        for s in _blocks(*g.shape):
            for j in range(n):
                torch.mul(g[s], w[s, j], out=grad_x[s, j])
                grad_w[s, j] = (x[s, j] * g[s]).sum(-1, keepdim=True)
        return grad_x.view_as(streams), grad_w.view_as(pre)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams: Tensor, comb: Tensor, post: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(streams, comb, post, output)
        *_, n, d = streams.shape
        x, c = streams.reshape(-1, n, d), comb.reshape(-1, n, n, 1)
        p, f = post.reshape(-1, n, 1), output.reshape(-1, d)
        out = torch.empty_like(x)
        for s in _blocks(*f.shape):
            rows = [x[s, j] for j in range(n)] + [f[s]]
            for k in range(n):
                _weighted_sum(out[s, k], [c[s, j, k] for j in range(n)] + [p[s, k]], rows)
        return out.view_as(streams)

    @staticmethod
    def backward(ctx, grad: Tensor):
        streams, comb, post, output = ctx.saved_tensors
        *_, n, d = streams.shape
        x, c = streams.reshape(-1, n, d), comb.reshape(-1, n, n, 1)
        p, f, g = post.reshape(-1, n, 1), output.reshape(-1, d), grad.reshape(-1, n, d)
        grad_x, grad_c, grad_p, grad_f = (torch.empty_like(t) for t in (x, c, p, f))
        for s in _blocks(*f.shape):
            rows = [g[s, k] for k in range(n)]
            _weighted_sum(grad_f[s], [p[s, k] for k in range(n)], rows)
            for j in range(n):
                _weighted_sum(grad_x[s, j], [c[s, j, k] for k in range(n)], rows)
                for k in range(n):
                    grad_c[s, j, k] = (x[s, j] * rows[k]).sum(-1, keepdim=True)
            for k in range(n):
                grad_p[s, k] = (f[s] * rows[k]).sum(-1, keepdim=True)
        return grad_x.view_as(streams), grad_c.view_as(comb), grad_p.view_as(post), grad_f.view_as(output)


class _NormalizedProduct(torch.autograd.Function):
    """``fn @ (x / rms(x))^T`` for x [N, w], fn [m, w] -> [m, N]."""

    @staticmethod
    def forward(ctx, x: Tensor, fn: Tensor, eps: float) -> Tensor:
        product = torch.mm(x, fn.t()).t()
        rms = torch.rsqrt(torch.linalg.vector_norm(x, dim=1).square() / x.shape[1] + eps)
        ctx.save_for_backward(x, fn, product, rms)
        return product * rms

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, fn, product, rms = ctx.saved_tensors
        scaled = grad * rms
        through_norm = -(grad * product).sum(0) * rms**3 / x.shape[1]
        grad_x = torch.mm(scaled.t(), fn).addcmul_(x, through_norm.unsqueeze(1))
        return grad_x, torch.mm(scaled, x), None


class _Sinkhorn(torch.autograd.Function):
    """Keeps every half-step's matrix and sums, so that the backward pass is one line per half-step."""

    @staticmethod
    def forward(ctx, logits: Tensor, iterations: int, eps: float) -> Tensor:
        ctx.steps = []
        pieces = []
        for piece in logits.split(_SINKHORN_TOKENS, dim=2):
            soft = matrix = piece.softmax(dim=1)
            matrix = matrix + eps
            halves = []
            for half in range(2 * iterations - 1):
                dim = half % 2
                sums = matrix.sum(dim=dim, keepdim=True).add_(eps)
                matrix = matrix / sums
                halves.append((dim, matrix, sums))
            ctx.steps.append((soft, halves))
            pieces.append(matrix)
        return torch.cat(pieces, dim=2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        pieces = []
        for piece, (soft, halves) in zip(grad.split(_SINKHORN_TOKENS, dim=2), ctx.steps):
            for dim, matrix, sums in reversed(halves):
                piece = (piece - (piece * matrix).sum(dim=dim, keepdim=True)).div_(sums)
            pieces.append(soft * (piece - (piece * soft).sum(dim=1, keepdim=True)))
        return torch.cat(pieces, dim=2), None, None
