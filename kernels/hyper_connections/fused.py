"""mHC for compilers: the reference's formulas as sums over few terms, which are fused with what surrounds them.

A compiler calls a library for matrix products, one for every token's 4 x 4 matrix here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.hyper_connections.reference import sinkhorn, weights_from_raw


def mixing_weights(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, S, n, d = streams.shape
    flat = streams.reshape(B * S, n * d).float()
    rms = torch.rsqrt(flat.square().mean(dim=-1) + norm_eps)
    # For one token the product is nothing but reading fn, which a fused sum does as fast as anything.
    product = (fn * flat).sum(-1, keepdim=True) if B * S == 1 else (flat @ fn.t()).t()
    return weights_from_raw(product * rms, (B, S, n), scale, base, eps, lambda x: sinkhorn(x, iterations, eps))


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    out = pre[..., :1] * streams[..., 0, :]
    for j in range(1, pre.shape[-1]):
        out = out + pre[..., j, None] * streams[..., j, :]
    return out


def enter(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pre, post, comb = mixing_weights(streams, fn, scale, base, iterations, eps, norm_eps)
    return collapse(streams, pre), post, comb, streams


def expand(streams: Tensor, comb: Tensor, post: Tensor, output: Tensor) -> Tensor:
    out = post.unsqueeze(-1) * output.unsqueeze(-2)
    for j in range(post.shape[-1]):
        out = out + comb[..., j, :, None] * streams[..., j, None, :]
    return out
