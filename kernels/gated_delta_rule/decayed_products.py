"""Products of queries and keys within chunks of tokens, with the decay between the two tokens in every channel.

The decay from token j to token i, D(j, i) = exp(sum of g over (j, i]), is never computed as a ratio of two cumulative
products, which overflow or vanish for strong decays. Blocks of tokens are merged in pairs instead, from single tokens
up to the chunk: for j in the first half and i in the second, D(j, i) = D(j, middle) * D(middle, i), whose factors are
at most 1. Each merge is a matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.autocast import in_float32


class DecayedProducts(NamedTuple):
    """Results for N chunks of L tokens."""

    inverse: Tensor
    """[N, L, L]: inverse of I + A, where A[i, j] = sum(beta_key[i] * key[j] * D(j, i)) for j < i."""
    weights: Tensor
    """[N, L, L]: sum(query[i] * key[j] * D(j, i)) for j <= i."""
    since_begin: Tensor
    """[N, L, K]: decay from the chunk's begin to token i, its own included."""
    until_end: Tensor
    """[N, L, K]: decay from token j to the chunk's end, its own excluded."""
    kept: Tensor
    """[N, K]: decay over the whole chunk."""


def decayed_products(query: Tensor, beta_key: Tensor, key: Tensor, g: Tensor) -> DecayedProducts:
    """Compute all products. All inputs are [N, L, K], where L is a power of two. ``beta_key`` is ``key`` times the step
    sizes, ``g`` the logarithms of the decays, which may be -inf."""
    return DecayedProducts(*_DecayedProducts.apply(*(x.contiguous() for x in (query, beta_key, key, g))))


class _DecayedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, beta_key, key, g):
        N, L, _ = key.shape
        inverse = torch.diag_embed(key.new_ones(N, L))
        weights = torch.diag_embed((query * key).sum(-1))
        since, until = g.exp(), torch.ones_like(g)
        for size, since_2, until_1 in _merges(since, until):
            columns = (_halves(key, size)[0] * until_1).transpose(1, 2)
            between = torch.bmm(_halves(beta_key, size)[1] * since_2, columns)
            blocks = _diagonal_blocks(inverse, size)
            first, second = (blocks[:, :, i, :, i].reshape(-1, size, size) for i in range(2))
            blocks[:, :, 1, :, 0] = -(second @ between @ first).unflatten(0, (N, -1))
            read = torch.bmm(_halves(query, size)[1] * since_2, columns)
            _diagonal_blocks(weights, size)[:, :, 1, :, 0] = read.unflatten(0, (N, -1))
        ctx.save_for_backward(query, beta_key, key, g, inverse)
        return inverse, weights, since, until, since[:, -1].clone()

    @staticmethod
    def backward(ctx, grad_inverse, grad_weights, grad_since, grad_until, grad_kept):
        """The gradient of g needs no products of its own: with G the cumulative sum of g, every term depends on
        G[i] - G[j], so that the gradient of G[i] is query[i] times its gradient, and that of G[j] is -key[j] times its
        own."""
        query, beta_key, key, g, inverse = ctx.saved_tensors
        with in_float32(key):
            grad_a = -(inverse.transpose(1, 2) @ grad_inverse @ inverse.transpose(1, 2))
            grads = grad_query, grad_beta_key, grad_key = tuple(torch.zeros_like(key) for _ in range(3))
            since, until = g.exp(), torch.ones_like(g)
            for size, since_2, until_1 in _merges(since, until):
                of_a, of_weights = (
                    _diagonal_blocks(x, size)[:, :, 1, :, 0].reshape(-1, size, size) for x in (grad_a, grad_weights)
                )
                columns = _halves(key, size)[0] * until_1
                _halves(grad_beta_key, size)[1].addcmul_(torch.bmm(of_a, columns), since_2)
                _halves(grad_query, size)[1].addcmul_(torch.bmm(of_weights, columns), since_2)
                back = torch.bmm(of_a.transpose(1, 2), _halves(beta_key, size)[1] * since_2)
                back.baddbmm_(of_weights.transpose(1, 2), _halves(query, size)[1] * since_2)
                _halves(grad_key, size)[0].addcmul_(back, until_1)
            to_end = until.mul_(grad_until)
            grad_sums = since * grad_since  # gradient of G
            grad_sums.sub_(to_end).addcmul_(query, grad_query).addcmul_(beta_key, grad_beta_key)
            grad_sums.addcmul_(key, grad_key, value=-1)
            grad_sums[:, -1].add_(to_end.sum(1)).addcmul_(since[:, -1], grad_kept)
            later = torch.ones(g.shape[1], g.shape[1], dtype=g.dtype, device=g.device).triu()
            own = grad_weights.diagonal(dim1=1, dim2=2).unsqueeze(-1)  # a token reads itself without decay
            grad_query.addcmul_(own, key)
            grad_key.addcmul_(own, query)
            return *grads, later @ grad_sums


def _merges(since: Tensor, until: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield, for block sizes 1, 2, 4, ... that merge in pairs, the size, D(begin, i) within second blocks and
    D(j, end) within first blocks, [pairs, size, K] each.

    ``since`` must hold the decays of single tokens [N, L, K], and ``until`` ones. Both grow in place to those of the
    whole chunk.
    """
    size = 1
    while size < since.shape[1]:
        since_1, since_2 = _halves(since, size)
        until_1, _ = _halves(until, size)
        yield size, since_2, until_1
        until_1 *= since_2[:, -1:]
        since_2 *= since_1[:, -1:]
        size *= 2


def _halves(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """View x [N, L, K] as pairs of blocks, [pairs, size, K] each."""
    return x.view(-1, 2, size, x.shape[-1]).unbind(1)


def _diagonal_blocks(x: Tensor, size: int) -> Tensor:
    """View the diagonal blocks of x [N, L, L] that merge pairs of blocks, [N, pairs, 2, size, 2, size]."""
    N, L, _ = x.shape
    pairs = L // (2 * size)
    return x.view(N, pairs, 2, size, pairs, 2, size).diagonal(dim1=1, dim2=4).movedim(-1, 1)
