"""Hyper-connections by Triton kernels, forward and backward.

The weights of a token, Sinkhorn iterations included, are computed on the chip from 2n + n * n logits. The backward pass
recomputes them and the input of the block: it saves the streams, the logits and one factor per token. Products are
float32, on NVIDIA GPUs as three TF32 products.

The forward pass reads the streams twice: the weights of a token depend on all of its streams, which do not stay on the
chip between two kernels. The input of the block is written once, normalized.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from kernels.autocast import in_float32
from kernels.hyper_connections import eager
from kernels.triton_support.platform import (
    ARCHITECTURES,
    float32_precision,
    require_choice,
    require_device,
    require_shapes,
)
from kernels.triton_support.tiles import Tile, Tiles, launch_best, padded_dim

STREAMS = (1, 2, 4)
"""Supported numbers of streams."""

PROJECT_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"BLOCK_T": 16, "BLOCK_K": 32}),),
    **{
        # The projection is read once per program: 16 tokens read it as often as the streams at 4 streams. But short
        # sequences need many programs.
        name: (Tile(4, 3, {"BLOCK_T": 64, "BLOCK_K": 64}), Tile(4, 3, {"BLOCK_T": 16, "BLOCK_K": 128}))
        for name in ARCHITECTURES
    },
}
MIX_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"BLOCK_T": 4}),),
    **{name: (Tile(8, 1, {"BLOCK_T": 4}), Tile(8, 1, {"BLOCK_T": 1})) for name in ARCHITECTURES},
}
EXPAND_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"BLOCK_T": 4, "BLOCK_D": 16}),),
    **{name: (Tile(4, 1, {"BLOCK_T": 1, "BLOCK_D": 1024}),) for name in ARCHITECTURES},
}
TOKEN_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"BLOCK_D": 16}),),
    **{name: (Tile(4, 1, {"BLOCK_D": 256}),) for name in ARCHITECTURES},
}
STREAMS_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"BLOCK_T": 16, "BLOCK_D": 16}),),
    **{
        name: (Tile(4, 1, {"BLOCK_T": 16, "BLOCK_D": 64}), Tile(8, 1, {"BLOCK_T": 16, "BLOCK_D": 128}))
        for name in ARCHITECTURES
    },
}


def supports(streams: Tensor) -> bool:
    """Return whether the backend supports these streams on a GPU."""
    return streams.dtype == torch.float32 and streams.shape[-2] in STREAMS


def padded_logits(n: int) -> int:
    """Return the logits of a token with n streams, 2n + n * n, rounded up to a power of two of at least 16."""
    return padded_dim(2 * n + n * n)


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
    """Implement :func:`kernels.hyper_connections.hc_pre`. Raises ValueError for unsupported streams."""
    _require(streams)
    n, d = streams.shape[2:]
    logits, name = 2 * n + n * n, "hyper_connections"
    require_shapes(name, fn=(fn, (logits, n * d)), scale=(scale, (3,)), base=(base, (logits,)))
    require_shapes(name, norm_weight=(norm_weight, (d,)))
    weights = (x.contiguous() for x in (fn, scale, base, norm_weight))
    return _Pre.apply(streams.contiguous(), *weights, iterations, eps, norm_eps)


def hc_post(streams: Tensor, comb: Tensor, post: Tensor, output: Tensor) -> Tensor:
    """Implement :func:`kernels.hyper_connections.hc_post`. Raises ValueError for unsupported streams."""
    _require(streams)
    B, S, n, d = streams.shape
    shapes = {"comb": (comb, (B, S, n, n)), "post": (post, (B, S, n)), "output": (output, (B, S, d))}
    require_shapes("hyper_connections", **shapes)
    return _Post.apply(streams.contiguous(), comb.contiguous(), post.contiguous(), output.contiguous())


def hc_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float) -> Tensor:
    """Implement :func:`kernels.hyper_connections.hc_head` in PyTorch: it runs once per pass."""
    _require(streams)
    return eager.hc_head(streams, fn, scale, base, eps, norm_eps)


def _require(streams: Tensor) -> None:
    require_device("hyper_connections", streams)
    require_choice("hyper_connections", "dtypes", streams.dtype, (torch.float32,))
    require_choice("hyper_connections", "numbers of streams", streams.shape[-2], STREAMS)


def _kernels():
    return importlib.import_module("kernels.hyper_connections.triton_kernels")


class _Pre(torch.autograd.Function):
    """:func:`hc_pre`, which also returns the streams.

    The backward pass thus receives the gradient of all later uses of the streams, and adds its own part to it while it
    computes it.
    """

    @staticmethod
    def forward(ctx, streams, fn, scale, base, norm_weight, iterations, eps, norm_eps):
        ctx.set_materialize_grads(False)
        B, S, n, d = streams.shape
        T, M = B * S, len(fn)
        device, shape = streams.device, (B * S, n, d)

        def project(tile: Tile) -> tuple[Tensor, Tensor]:
            raw, inverse_rms = streams.new_empty(T, M), streams.new_empty(T)
            _kernels().project[(-(-T // tile.sizes["BLOCK_T"]),)](
                streams, fn, raw, inverse_rms, T, n * d, norm_eps,
                M=M, M_PAD=padded_logits(n), PRECISION=float32_precision(), **tile.options,
            )  # fmt: skip
            return raw, inverse_rms

        def mix(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
            x, post, comb = (streams.new_empty(B, S, *rest) for rest in ((d,), (n,), (n, n)))
            _kernels().mix[(-(-T // tile.sizes["BLOCK_T"]),)](
                streams, raw, scale, base, norm_weight, x, post, comb, T, d, eps, norm_eps, iterations,
                M=M, N=n, BLOCK_D=padded_dim(d), **tile.options,
            )  # fmt: skip
            return x, post, comb

        raw, inverse_rms = launch_best("hyper_connections.project", PROJECT_TILES, shape, device, project)
        x, post, comb = launch_best("hyper_connections.mix", MIX_TILES, shape, device, mix)
        ctx.save_for_backward(streams, fn, scale, base, norm_weight, raw, inverse_rms)
        ctx.iterations, ctx.eps, ctx.norm_eps = iterations, eps, norm_eps
        return x, post, comb, streams

    @staticmethod
    def backward(ctx, grad_x, grad_post, grad_comb, later):
        if grad_x is None and grad_post is None and grad_comb is None:
            return later, *[None] * 7
        streams, fn, scale, base, norm_weight, raw, inverse_rms = ctx.saved_tensors
        B, S, n, d = streams.shape
        T, M, shape = B * S, len(fn), (B * S, n, d)

        def dense(grad: Tensor | None, *rest: int) -> Tensor:
            return streams.new_zeros(B, S, *rest) if grad is None else grad.float().contiguous()

        upstream = dense(grad_x, d), dense(grad_post, n), dense(grad_comb, n, n)

        def logits(tile: Tile) -> tuple[Tensor, Tensor]:
            divisors = streams.new_empty(T, (2 * ctx.iterations - 1) * n)
            out, factors = streams.new_empty(T, M), streams.new_empty(T, 2)
            _kernels().mix_backward[(T,)](
                streams, raw, scale, base, norm_weight, *upstream, divisors, out, factors,
                d, ctx.eps, ctx.norm_eps, ctx.iterations,
                M=M, N=n, **tile.options,
            )  # fmt: skip
            return out, factors

        with in_float32(streams):  # the backward pass may run under autocast
            grad_logits, factors = launch_best(
                "hyper_connections.mix_backward", TOKEN_TILES, shape, streams.device, logits
            )
            groups = [n, n, n * n]
            grad_scale = torch.stack([x.sum() for x in (grad_logits * raw).split(groups, dim=1)])
            grad_raw = grad_logits * scale.repeat_interleave(torch.tensor(groups, device=scale.device), output_size=M)
            products = grad_raw * inverse_rms.unsqueeze(1)
            through_norm = -(grad_raw * raw).sum(1) * inverse_rms.square() / (n * d)
            grad_fn = products.t() @ streams.view(T, n * d)

            def finish(tile: Tile) -> tuple[Tensor, Tensor]:
                grid = (-(-T // tile.sizes["BLOCK_T"]), -(-d // tile.sizes["BLOCK_D"]))
                out, parts = torch.empty_like(streams), streams.new_empty(grid[0], d)
                _kernels().streams_backward[grid](
                    streams if later is None else later.contiguous(), upstream[0], products, through_norm, factors,
                    raw, scale, base, norm_weight, fn, streams, out, parts, T, d, ctx.eps,
                    M=M, M_PAD=padded_logits(n), N=n, HAS_LATER=later is not None, PRECISION=float32_precision(),
                    **tile.options,
                )  # fmt: skip
                return out, parts

            grad_streams, parts = launch_best(
                "hyper_connections.streams_backward", STREAMS_TILES, shape, streams.device, finish
            )
        return grad_streams, grad_fn, grad_scale, grad_logits.sum(0), parts.sum(0), None, None, None


class _Post(torch.autograd.Function):
    """:func:`hc_post`."""

    @staticmethod
    def forward(ctx, streams, comb, post, output):
        ctx.save_for_backward(streams, comb, post, output)
        B, S, n, d = streams.shape

        def run(tile: Tile) -> Tensor:
            out = torch.empty_like(streams)
            grid = (-(-B * S // tile.sizes["BLOCK_T"]), -(-d // tile.sizes["BLOCK_D"]))
            _kernels().expand[grid](streams, comb, post, output, out, B * S, d, N=n, **tile.options)
            return out

        return launch_best("hyper_connections.expand", EXPAND_TILES, (B * S, n, d), streams.device, run)

    @staticmethod
    def backward(ctx, grad):
        streams, comb, post, output = ctx.saved_tensors
        B, S, n, d = streams.shape
        grad = grad.contiguous()

        def run(tile: Tile) -> tuple[Tensor, ...]:
            gradients = tuple(torch.empty_like(x) for x in (streams, comb, post))
            wide = torch.empty_like(output, dtype=torch.float32)
            _kernels().expand_backward[(B * S,)](
                grad, streams, comb, post, output, *gradients, wide, d, N=n, **tile.options
            )
            return *gradients, wide.to(output.dtype)

        return launch_best("hyper_connections.expand_backward", TOKEN_TILES, (B * S, n, d), streams.device, run)
