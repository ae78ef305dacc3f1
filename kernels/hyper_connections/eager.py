"""Manifold-constrained hyper-connections for CPUs, with fewer passes over memory, forward and backward.

CPU libraries compute thousands of products of 4 x 4 with 4 x d matrices in one call, provided that every matrix is
contiguous. Otherwise they compute them one by one, a hundred times slower.

The backward passes are explicit. For the norm and the Sinkhorn iteration autograd would read the streams several times
and launch hundreds of small operations, and it would accumulate the gradient of the streams from three tensors of their
size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.hyper_connections.reference import pre_from_raw, weights_from_raw
from kernels.rms_norm import rms_norm

_SINKHORN_TOKENS = 2048
"""Tokens whose n x n matrices are iterated together. Large enough to amortize the overhead of an operation (1,024 take
a fifth longer), small enough to keep the half-steps in the cache."""


def hc_pre(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_weight: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implement :func:`kernels.hyper_connections.hc_pre`."""
    raw, streams = _NormalizedProduct.apply(streams, fn, norm_eps)
    pre, post, comb = weights_from_raw(
        raw, streams.shape[:3], scale, base, eps, lambda logits: _Sinkhorn.apply(logits, iterations, eps)
    )
    x, streams = _Collapse.apply(streams, pre)
    return rms_norm(x, norm_eps, norm_weight), post, comb, streams


def hc_post(streams: Tensor, comb: Tensor, post: Tensor, output: Tensor) -> Tensor:
    """Implement :func:`kernels.hyper_connections.hc_post`."""
    return _Post.apply(streams, comb, post, output)


def hc_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float) -> Tensor:
    """Implement :func:`kernels.hyper_connections.hc_head`."""
    raw, streams = _NormalizedProduct.apply(streams, fn, norm_eps)
    return _Collapse.apply(streams, pre_from_raw(raw, streams.shape[:3], scale, base, eps))[0]


# The first two functions also return the streams. Their backward passes thus receive the gradient of all later uses of
# the streams, and add their own part to it while they compute it.


class _NormalizedProduct(torch.autograd.Function):
    """``fn @ (x / rms(x))^T``, [m, B * S], for fn [m, n * d] and streams [B, S, n, d], seen as x [B * S, n * d]."""

    @staticmethod
    def forward(ctx, streams: Tensor, fn: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        x = streams.reshape(-1, fn.shape[1])
        product = torch.mm(x, fn.t()).t()
        inverse_rms = torch.rsqrt(torch.linalg.vector_norm(x, dim=1).square() / x.shape[1] + eps)
        ctx.save_for_backward(streams, fn, product, inverse_rms)
        return product * inverse_rms, streams

    @staticmethod
    def backward(ctx, grad: Tensor | None, later: Tensor | None):
        streams, fn, product, inverse_rms = ctx.saved_tensors
        if grad is None:
            return later, None, None
        x = streams.reshape(-1, fn.shape[1])
        scaled = grad * inverse_rms
        through_norm = -(grad * product).sum(0) * inverse_rms**3 / x.shape[1]
        grad_x = torch.mm(scaled.t(), fn) if later is None else torch.addmm(later.reshape(x.shape), scaled.t(), fn)
        return grad_x.addcmul_(x, through_norm.unsqueeze(1)).view_as(streams), torch.mm(scaled, x), None


class _Collapse(torch.autograd.Function):
    """Weighted sum of streams [B, S, n, d] with weights pre [B, S, n]: [B, S, d]."""

    @staticmethod
    def forward(ctx, streams: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(streams, pre)
        *lead, n, d = streams.shape
        return torch.bmm(pre.reshape(-1, 1, n), streams.reshape(-1, n, d)).view(*lead, d), streams

    @staticmethod
    def backward(ctx, grad: Tensor | None, later: Tensor | None):
        streams, pre = ctx.saved_tensors
        if grad is None:
            return later, None
        *_, n, d = streams.shape
        g = grad.reshape(-1, d)
        grad_pre = torch.bmm(streams.reshape(-1, n, d), g.unsqueeze(-1)).view_as(pre)
        w, across = pre.unsqueeze(-1), g.view(*streams.shape[:-2], 1, d)
        return w * across if later is None else torch.addcmul(later, w, across), grad_pre


class _Post(torch.autograd.Function):
    """New streams [B, S, n, d] from streams [B, S, n, d], comb [B, S, n, n], post [B, S, n] and output [B, S, d]."""

    @staticmethod
    def forward(ctx, streams: Tensor, comb: Tensor, post: Tensor, output: Tensor) -> Tensor:
        *_, n, d = streams.shape
        comb = comb.contiguous()
        ctx.save_for_backward(streams, comb, post, output)
        out = torch.bmm(comb.view(-1, n, n).transpose(1, 2), streams.reshape(-1, n, d))
        return out.addcmul_(post.reshape(-1, n, 1), output.float().reshape(-1, 1, d)).view_as(streams)

    @staticmethod
    def backward(ctx, grad: Tensor):
        streams, comb, post, output = ctx.saved_tensors
        *_, n, d = streams.shape
        g, x, f = grad.reshape(-1, n, d), streams.reshape(-1, n, d), output.float().reshape(-1, d, 1)
        return (
            torch.bmm(comb.view(-1, n, n), g).view_as(streams),
            torch.bmm(x, g.transpose(1, 2)).view_as(comb),
            torch.bmm(g, f).view_as(post),
            torch.bmm(post.reshape(-1, 1, n), g).view_as(output).to(output.dtype),
        )


class _Sinkhorn(torch.autograd.Function):
    """:func:`kernels.hyper_connections.sinkhorn` of logits [n, n, N].

    The backward pass recomputes the matrix and the sums of every half-step. Saved, they would take 50 times the memory
    of the logits: three quarters of that of the streams at 512 dims.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, iterations: int, eps: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.iterations, ctx.eps = iterations, eps
        pieces = logits.split(_SINKHORN_TOKENS, dim=2)
        return torch.cat([_half_steps(piece, iterations, eps)[1][-1][1] for piece in pieces], dim=2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (logits,) = ctx.saved_tensors
        pieces = []
        for piece, own in zip(*(t.split(_SINKHORN_TOKENS, dim=2) for t in (grad.contiguous(), logits))):
            soft, halves = _half_steps(own, ctx.iterations, ctx.eps)
            for dim, matrix, sums in reversed(halves):
                piece = (piece - (piece * matrix).sum(dim=dim, keepdim=True)).div_(sums)
            pieces.append(soft * (piece - (piece * soft).sum(dim=1, keepdim=True)))
        return torch.cat(pieces, dim=2), None, None


def _half_steps(logits: Tensor, iterations: int, eps: float) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
    """Return the softmax and, for every division by row or column sums, the dim of the sum, the result and the sums."""
    soft = logits.softmax(dim=1)
    matrix, halves = soft + eps, []
    for half in range(2 * iterations - 1):
        dim = half % 2
        sums = matrix.sum(dim=dim, keepdim=True).add_(eps)
        matrix = matrix / sums
        halves.append((dim, matrix, sums))
    return soft, halves
