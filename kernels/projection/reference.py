"""An attention layer's projections, operation by operation; each of them picks its own backend (report 2.3.1)."""

from __future__ import annotations

from torch import Tensor

from kernels.cache_io import EntryLayout, pack
from kernels.linear import grouped_linear, linear
from kernels.quantize import hadamard
from kernels.rms_norm import rms_normalize
from kernels.rotary import rotate


def latent_query(
    x: Tensor, wq_a: Tensor, norm: Tensor, wq_b: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries through a latent: x [B, S, hidden], wq_a [rank, hidden], norm [rank] and wq_b [heads * c, rank] -> the
    normalized latent [B, S, rank], and queries [B, S, heads, c], each normalized and rotated."""
    latent = rms_normalize(linear(x, wq_a), eps, norm)
    query = rms_normalize(linear(latent, wq_b).unflatten(-1, (heads, -1)), eps)
    return latent, rotate(query, cos, sin)


def key_value(x: Tensor, wkv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """The vector that is key and value of a token: x [B, S, hidden], wkv [c, hidden], norm [c] -> [B, S, c]."""
    return rotate(rms_normalize(linear(x, wkv), eps, norm), cos, sin)


def packed_key_value(
    x: Tensor, wkv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, eps: float, layout: EntryLayout
) -> Tensor:
    """:func:`key_value` as a cache stores it: uint8 [B, S, layout.nbytes]."""
    return pack(key_value(x, wkv, norm, cos, sin, eps), layout)


def grouped_output(mixed: Tensor, cos: Tensor, sin: Tensor, wo_a: Tensor, wo_b: Tensor) -> Tensor:
    """Heads' outputs [B, S, H, c] back to [B, S, hidden] by a grouped low-rank projection: wo_a [g, rank, H / g * c],
    wo_b [hidden, g * rank]."""
    # The values carry rotary dims at their own positions; rotating the sum back by the query's leaves the offset.
    rotated = rotate(mixed, cos, sin, inverse=True)
    return linear(grouped_linear(rotated.flatten(2), wo_a), wo_b)


def index_query(latent: Tensor, wq_b: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """The lightning indexer's queries: latent [B, S, rank], wq_b [heads * c, rank] -> [B, S, heads, c], rotated by
    position and by Hadamard's matrix."""
    return hadamard(rotate(linear(latent, wq_b).unflatten(-1, (heads, -1)), cos, sin))
