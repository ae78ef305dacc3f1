"""mHC in eager PyTorch (report 2.2; mHC paper, arXiv 2512.24880).

Streams X are [B, S, n, d]. A block F is wrapped as ``X' = combT X + post F(pre X)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Scale ``exp(logits)`` towards a doubly stochastic matrix. Logits [n, n, N]: rows, columns, then any batch.

    The first iteration is a row softmax, then a column step; ``iterations - 1`` more (row, column) pairs follow.
    The batch is the last dim so that sums over rows and columns run over contiguous memory.
    """
    matrix = logits.softmax(dim=1) + eps
    matrix = matrix / (matrix.sum(dim=0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(dim=1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(dim=0, keepdim=True) + eps)
    return matrix


def normalized_product(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """``fn`` [m, n * d] times every token's streams side by side, over their root mean square: [m, B * S]."""
    flat = streams.reshape(-1, fn.shape[1]).float()
    # Normalising after the product gives the same numbers and saves a pass over the streams.
    return (fn @ flat.transpose(0, 1)) * torch.rsqrt(flat.square().mean(dim=-1) + norm_eps)


def weights_from_raw(
    raw: Tensor,
    shape: Sequence[int],
    scale: Tensor,
    base: Tensor,
    eps: float,
    make_doubly_stochastic: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token weights pre [B, S, n], post [B, S, n] and comb [B, S, n, n] for streams of ``shape`` [B, S, n], from
    :func:`normalized_product`'s raw [2n + n * n, B * S]. comb's row is the source stream, its column the target."""
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
    """raw [n, B * S] to the streams' weights in a block's input, ``shape`` [B, S, n]."""
    return (torch.sigmoid(raw * scale + base.unsqueeze(-1)) + eps).t().reshape(*shape)


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """The block's input: streams [B, S, n, d] weighted by pre [B, S, n], summed to [B, S, d]."""
    return (pre.unsqueeze(-2) @ streams).squeeze(-2)


def enter(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The way into a block, for streams [B, S, n, d]: its input [B, S, d], post [B, S, n] and comb [B, S, n, n] as
    :func:`weights_from_raw` gives them, and the streams again.

    fn [2n + n * n, n * d], scale [3] and base [2n + n * n], in the order pre, post, comb; all float32. Where gradients
    are recorded :func:`expand` has to take the streams that this gives: their gradient is then summed up on its way.
    """
    raw = normalized_product(streams, fn, norm_eps)
    pre, post, comb = weights_from_raw(raw, streams.shape[:3], scale, base, eps, lambda x: sinkhorn(x, iterations, eps))
    return collapse(streams, pre), post, comb, streams


def head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float) -> Tensor:
    """What the last streams come to, [B, S, d]: collapsed by weights as a block's, from fn [n, n * d], scale [1] and
    base [n]."""
    raw = normalized_product(streams, fn, norm_eps)
    return collapse(streams, pre_from_raw(raw, streams.shape[:3], scale, base, eps))


def expand(streams: Tensor, comb: Tensor, post: Tensor, output: Tensor) -> Tensor:
    """New streams: ``out[k] = sum_j comb[j, k] * streams[j] + post[k] * output``; [B, S, n, d], in streams' dtype."""
    return comb.transpose(-1, -2) @ streams + post.unsqueeze(-1) * output.to(streams.dtype).unsqueeze(-2)
