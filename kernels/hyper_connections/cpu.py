"""Manifold-constrained hyper-connections by native operators, with one pass over the streams forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.autocast import in_float32
from kernels.hyper_connections import eager
from kernels.rms_norm import rms_norm

MAX_STREAMS = 8
"""Maximum number of streams n that the native operators support."""


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
    streams = streams.contiguous()
    if torch.is_grad_enabled():
        x, post, comb, streams = _Pre.apply(streams, fn, scale, base, iterations, eps, norm_eps)
    else:
        x, post, comb, _, _ = native.op("hc_pre")(streams, fn, scale, base, iterations, eps, norm_eps)
    return rms_norm(x, norm_eps, norm_weight), post, comb, streams


def hc_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float) -> Tensor:
    """Implement :func:`kernels.hyper_connections.hc_head`."""
    if torch.is_grad_enabled():  # runs once per pass, so a native backward operator would gain nothing
        return eager.hc_head(streams, fn, scale, base, eps, norm_eps)
    return native.op("hc_head")(streams.contiguous(), fn, scale, base, eps, norm_eps)


def hc_post(streams: Tensor, comb: Tensor, post: Tensor, output: Tensor) -> Tensor:
    """Implement :func:`kernels.hyper_connections.hc_post`."""
    arguments = streams.contiguous(), comb.contiguous(), post.contiguous(), output.contiguous()
    return _Post.apply(*arguments) if torch.is_grad_enabled() else native.op("hc_post")(*arguments)


class _Pre(torch.autograd.Function):
    """:func:`hc_pre` without the norm of the block's input, which also returns the streams.

    The backward pass thus receives the gradient of all later uses of the streams, and adds its own part to it while it
    computes it.
    """

    @staticmethod
    def forward(ctx, streams, fn, scale, base, iterations, eps, norm_eps):
        ctx.set_materialize_grads(False)
        x, post, comb, raw, inverse_rms = native.op("hc_pre")(streams, fn, scale, base, iterations, eps, norm_eps)
        ctx.save_for_backward(streams, fn, scale, base, raw, inverse_rms)
        ctx.iterations, ctx.eps = iterations, eps
        return x, post, comb, streams

    @staticmethod
    def backward(ctx, grad_x, grad_post, grad_comb, later):
        streams, fn, scale, base, raw, inverse_rms = ctx.saved_tensors
        if grad_x is None and grad_post is None and grad_comb is None:
            return later, None, None, None, None, None, None
        B, S, n, d = streams.shape

        def dense(grad: Tensor | None, *shape: int) -> Tensor:
            return streams.new_zeros(shape) if grad is None else grad.float().contiguous()

        with in_float32(streams):  # the backward pass may run under autocast
            gradients = native.op("hc_pre_backward")(
                dense(grad_x, B, S, d),
                dense(grad_post, B, S, n),
                dense(grad_comb, B, S, n, n),
                None if later is None else later.contiguous(),
                *(streams, fn, scale, base, raw, inverse_rms, ctx.iterations, ctx.eps),
            )
        return *gradients, None, None, None


class _Post(torch.autograd.Function):
    """:func:`hc_post`."""

    @staticmethod
    def forward(ctx, streams, comb, post, output):
        ctx.save_for_backward(streams, comb, post, output)
        return native.op("hc_post")(streams, comb, post, output)

    @staticmethod
    def backward(ctx, grad):
        streams, comb, post, output = ctx.saved_tensors
        *gradients, grad_output = native.op("hc_post_backward")(grad, streams, comb, post, output)
        return *gradients, grad_output.to(output.dtype)
