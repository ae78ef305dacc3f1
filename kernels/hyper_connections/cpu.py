"""mHC by native operators, forward and backward: one pass over the streams each."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.autocast import in_float32
from kernels.hyper_connections import batched

MAX_STREAMS = 8


def enter(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`kernels.hyper_connections.reference.enter`, float32."""
    streams = streams.contiguous()
    if not torch.is_grad_enabled():
        x, post, comb, _, _ = native.op("hc_enter")(streams, fn, scale, base, iterations, eps, norm_eps)
        return x, post, comb, streams
    return _Enter.apply(streams, fn, scale, base, iterations, eps, norm_eps)


def head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float) -> Tensor:
    """:func:`kernels.hyper_connections.reference.head`, float32."""
    if torch.is_grad_enabled():  # once a pass, so a backward operator of its own would gain nothing
        return batched.head(streams, fn, scale, base, eps, norm_eps)
    return native.op("hc_head")(streams.contiguous(), fn, scale, base, eps, norm_eps)


def expand(streams: Tensor, comb: Tensor, post: Tensor, output: Tensor) -> Tensor:
    """:func:`kernels.hyper_connections.reference.expand`, for float32 streams and float32 or BF16 output."""
    arguments = streams.contiguous(), comb.contiguous(), post.contiguous(), output.contiguous()
    return _Expand.apply(*arguments) if torch.is_grad_enabled() else native.op("hc_expand")(*arguments)


class _Enter(torch.autograd.Function):
    """Also hands the streams on, and so gets the gradient that everything later has for them: its own part is added in
    the pass that computes it."""

    @staticmethod
    def forward(ctx, streams, fn, scale, base, iterations, eps, norm_eps):
        ctx.set_materialize_grads(False)
        x, post, comb, raw, inverse_rms = native.op("hc_enter")(streams, fn, scale, base, iterations, eps, norm_eps)
        ctx.save_for_backward(streams, fn, scale, base, raw, inverse_rms)
        ctx.iterations, ctx.eps = iterations, eps
        return x, post, comb, streams

    @staticmethod
    def backward(ctx, grad_x, grad_post, grad_comb, later):
        streams, fn, scale, base, raw, inverse_rms = ctx.saved_tensors
        if grad_x is None and grad_post is None and grad_comb is None:
            return later, None, None, None, None, None, None
        B, S, n, d = streams.shape

        def given(grad: Tensor | None, *shape: int) -> Tensor:
            return streams.new_zeros(shape) if grad is None else grad.float().contiguous()

        with in_float32(streams):  # whatever surrounds the backward pass
            gradients = native.op("hc_enter_backward")(
                given(grad_x, B, S, d),
                given(grad_post, B, S, n),
                given(grad_comb, B, S, n, n),
                None if later is None else later.contiguous(),
                *(streams, fn, scale, base, raw, inverse_rms, ctx.iterations, ctx.eps),
            )
        return *gradients, None, None, None


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams, comb, post, output):
        ctx.save_for_backward(streams, comb, post, output)
        return native.op("hc_expand")(streams, comb, post, output)

    @staticmethod
    def backward(ctx, grad):
        streams, comb, post, output = ctx.saved_tensors
        *gradients, grad_output = native.op("hc_expand_backward")(grad, streams, comb, post, output)
        return *gradients, grad_output.to(output.dtype)
