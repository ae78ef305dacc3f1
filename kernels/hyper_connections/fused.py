"""mHC for compilers: the reference's formulas as sums over few terms, which are fused with what surrounds them.

A compiler calls a library for matrix products, one for every token's 4 x 4 matrix here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.hyper_connections.reference import pre_from_raw, sinkhorn, weights_from_raw


def normalized_product(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    flat = streams.reshape(-1, fn.shape[1]).float()
    rms = torch.rsqrt(flat.square().mean(dim=-1) + norm_eps)
    # For one token the product is nothing but reading fn, which a fused sum does as fast as anything.
    return ((fn * flat).sum(-1, keepdim=True) if len(flat) == 1 else (flat @ fn.t()).t()) * rms


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    out = pre[..., :1] * streams[..., 0, :]
    for j in range(1, pre.shape[-1]):
        out = out + pre[..., j, None] * streams[..., j, :]
    return out


def enter(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raw = normalized_product(streams, fn, norm_eps)
    pre, post, comb = weights_from_raw(raw, streams.shape[:3], scale, base, eps, lambda x: sinkhorn(x, iterations, eps))
    return collapse(streams, pre), post, comb, streams


def head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float) -> Tensor:
    raw = normalized_product(streams, fn, norm_eps)
    return collapse(streams, pre_from_raw(raw, streams.shape[:3], scale, base, eps))


def expand(streams: Tensor, comb: Tensor, post: Tensor, output: Tensor) -> Tensor:
    out = post.unsqueeze(-1) * output.unsqueeze(-2)
    for j in range(post.shape[-1]):
        out = out + comb[..., j, :, None] * streams[..., j, None, :]
    return out
