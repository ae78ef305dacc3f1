"""Manifold-constrained hyper-connections in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Scale ``exp(logits)`` towards doubly stochastic matrices.

    The first iteration is a softmax over every row and a division by the column sums. ``iterations - 1`` more pairs of
    divisions by row and column sums follow.

    Args:
        logits: [n, n, N]: rows, columns, batch. The batch is the last dim so that sums over rows and columns read
            contiguous memory.
        iterations: At least 1.
        eps: Added to the softmax and to all sums.
    """
    matrix = logits.softmax(dim=1) + eps
    matrix = matrix / (matrix.sum(dim=0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(dim=1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(dim=0, keepdim=True) + eps)
    return matrix


def normalized_product(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """Multiply ``fn`` [m, n * d] with the concatenated, RMS-normalized streams of every token: [m, B * S]."""
    flat = streams.reshape(-1, fn.shape[1]).to(torch.promote_types(streams.dtype, torch.float32))
    # Normalizing the product instead of the streams is equivalent and saves a pass over them.
    return (fn @ flat.transpose(0, 1)) * torch.rsqrt(flat.square().mean(dim=-1) + norm_eps)


def weights_from_raw(
    raw: Tensor,
    shape: Sequence[int],
    scale: Tensor,
    base: Tensor,
    eps: float,
    make_doubly_stochastic: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of every token: pre [B, S, n], post [B, S, n] and comb [B, S, n, n].

    ``raw`` [2n + n * n, B * S] is the result of :func:`normalized_product`, ``shape`` is [B, S, n]. Rows of comb are
    source streams, columns are target streams.
    """
    B, S, n = shape
    pre = pre_from_raw(raw[:n], shape, scale[0], base[:n], eps)
    post = 2 * torch.sigmoid(raw[n : 2 * n] * scale[1] + base[n : 2 * n, None])
    comb = make_doubly_stochastic((raw[2 * n :] * scale[2] + base[2 * n :, None]).view(n, n, -1))
    return (
        pre,
        post.t().reshape(B, S, n),
        comb.permute(2, 0, 1).reshape(B, S, n, n),
    )


def pre_from_raw(raw: Tensor, shape: Sequence[int], scale: Tensor, base: Tensor, eps: float) -> Tensor:
    """Return the weights of the streams in the input of a block, of ``shape`` [B, S, n], from raw [n, B * S]."""
    return (torch.sigmoid(raw * scale + base.unsqueeze(-1)) + eps).t().reshape(*shape)


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """Return the weighted sum of streams [B, S, n, d] with weights pre [B, S, n]: [B, S, d]."""
    return (pre.unsqueeze(-2) @ streams).squeeze(-2)


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
    raw = normalized_product(streams, fn, norm_eps)
    pre, post, comb = weights_from_raw(raw, streams.shape[:3], scale, base, eps, lambda x: sinkhorn(x, iterations, eps))
    x = collapse(streams, pre)
    normalized = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps) * norm_weight
    return normalized, post, comb, streams


def hc_post(streams: Tensor, comb: Tensor, post: Tensor, output: Tensor) -> Tensor:
    """Implement :func:`kernels.hyper_connections.hc_post`."""
    return comb.transpose(-1, -2) @ streams + post.unsqueeze(-1) * output.to(streams.dtype).unsqueeze(-2)


def hc_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float) -> Tensor:
    """Implement :func:`kernels.hyper_connections.hc_head`."""
    raw = normalized_product(streams, fn, norm_eps)
    return collapse(streams, pre_from_raw(raw, streams.shape[:3], scale, base, eps))
