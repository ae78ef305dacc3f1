"""Projections of an attention layer, as compositions of other operations."""

from __future__ import annotations

from torch import Tensor

from kernels.cache_io import EntryLayout, pack
from kernels.hadamard import hadamard
from kernels.linear import grouped_linear, linear
from kernels.rms_norm import rms_norm
from kernels.rotary import rotate


def latent_query(
    x: Tensor, wq_a: Tensor, norm: Tensor, wq_b: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.projection.latent_query`."""
    latent = rms_norm(linear(x, wq_a), eps, norm)
    query = rms_norm(linear(latent, wq_b).unflatten(-1, (heads, -1)), eps)
    return latent, rotate(query, cos, sin)


def key_value(x: Tensor, wkv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Return the vector that serves as both key and value of a token, normalized and rotated: [B, S, c].

    Args:
        x: [B, S, hidden].
        wkv: [c, hidden].
        norm: float32 [c], the weight of the RMS norm.
        cos: float32 [B or 1, S, r], as in :func:`kernels.rotary.rotate`.
        sin: float32 [B or 1, S, r].
        eps: Added to the mean square.
    """
    return rotate(rms_norm(linear(x, wkv), eps, norm), cos, sin)


def packed_key_value(
    x: Tensor, wkv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, eps: float, layout: EntryLayout
) -> Tensor:
    """Implement :func:`kernels.projection.packed_key_value`."""
    return pack(key_value(x, wkv, norm, cos, sin, eps), layout)


def grouped_output(attended: Tensor, cos: Tensor, sin: Tensor, wo_a: Tensor, wo_b: Tensor) -> Tensor:
    """Implement :func:`kernels.projection.grouped_output`."""
    # Values are rotated by their own positions. Rotating their sum back by the position of the query leaves the
    # relative offset.
    rotated = rotate(attended, cos, sin, inverse=True)
    return linear(grouped_linear(rotated.flatten(2), wo_a), wo_b)


def index_query(latent: Tensor, wq_b: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Implement :func:`kernels.projection.index_query`."""
    return hadamard(rotate(linear(latent, wq_b).unflatten(-1, (heads, -1)), cos, sin))
