"""Manifold-constrained hyper-connections (mHC): residual streams mixed by doubly stochastic matrices.

A block F is wrapped as ``X' = comb^T X + post F(norm(pre X))`` for n streams X (report 2.2; mHC paper, arXiv
2512.24880). :func:`hc_pre` computes the input of F, RMS-normalized, and the weights of every token, :func:`hc_post` the
new streams, and :func:`hc_head` the input of the final norm. All weights are float32.
"""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.hyper_connections import cpu, eager, reference, triton
from kernels.hyper_connections.recomputed_streams import RecomputedStreams
from kernels.hyper_connections.reference import sinkhorn
from kernels.triton_support.platform import can_run

__all__ = ["BACKENDS", "RecomputedStreams", "backend_for", "hc_head", "hc_post", "hc_pre", "sinkhorn"]

BACKENDS = {"reference": reference, "eager": eager, "cpu": cpu, "triton": triton}


def backend_for(streams: Tensor) -> str:
    """Return the backend for streams [B, S, n, d]. All of them have gradients."""
    if can_run(streams) and triton.supports(streams):
        return "triton"
    if native.serves(streams, backward=True) and streams.shape[-2] <= cpu.MAX_STREAMS:
        return "cpu"
    return "eager" if streams.is_cpu and streams.dtype.itemsize == 4 else "reference"


def hc_pre(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_weight: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the normalized input of a block and the weights of its output.

    Args:
        streams: float32 [B, S, n, d].
        fn: [2n + n * n, n * d], projection of the normalized streams to the logits of pre, post and comb, in order.
        scale: [3], factors of the logits of pre, post and comb.
        base: [2n + n * n], biases of the logits.
        norm_weight: [d], weight of the block's RMS norm.
        iterations: Sinkhorn iterations of comb.
        eps: Added to pre and to the sums of the Sinkhorn iterations.
        norm_eps: Added to the mean squares of the streams and of their weighted sum, the input before its norm.

    Returns:
        The input of the block, float32 [B, S, d], post [B, S, n], comb [B, S, n, n] (source stream, target stream),
        and the streams. If gradients are recorded, :func:`hc_post` must receive the returned streams: their gradient is
        then accumulated in place.
    """
    return get_backend(BACKENDS, backend or backend_for(streams)).hc_pre(
        streams, fn, scale, base, norm_weight, iterations, eps, norm_eps
    )


def hc_post(streams: Tensor, comb: Tensor, post: Tensor, output: Tensor, backend: str | None = None) -> Tensor:
    """Return the streams after a block: ``out[k] = sum_j comb[j, k] * streams[j] + post[k] * output``.

    Args:
        streams: float32 [B, S, n, d].
        comb: float32 [B, S, n, n], from :func:`hc_pre`.
        post: float32 [B, S, n], from :func:`hc_pre`.
        output: [B, S, d], the output of the block, float32 or BF16.

    Returns:
        float32 [B, S, n, d].
    """
    return get_backend(BACKENDS, backend or backend_for(streams)).hc_post(streams, comb, post, output)


def hc_head(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    eps: float,
    norm_eps: float,
    backend: str | None = None,
) -> Tensor:
    """Collapse the streams of the last layer, float32 [B, S, n, d], to [B, S, d].

    The weights are computed as pre in :func:`hc_pre`, from fn [n, n * d], scale [1] and base [n].
    """
    return get_backend(BACKENDS, backend or backend_for(streams)).hc_head(streams, fn, scale, base, eps, norm_eps)
