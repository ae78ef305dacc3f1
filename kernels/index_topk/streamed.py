"""Selection straight from packed keys: tiles of them are unpacked, scored and dropped while they are in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.autocast import in_float32
from kernels.cache_io import EntryLayout, Pages, unpack
from kernels.index_topk.reference import best_places

_SCORES = 1 << 22
"""Scores that are held at once, [queries, entries]: with more entries fewer queries are taken together."""
_QUERIES = 64
_TILE_ELEMENTS = 1 << 20
"""Products of a tile, [queries * heads, entries], that are unpacked and dropped together."""
_INVARIANT_ROWS, _MOST_ROWS = 1024, 16384


@torch.no_grad()
def index_topk(
    query: Tensor,
    keys: Pages,
    layout: EntryLayout,
    head_weights: Tensor,
    visible: Tensor,
    k: int,
    dtype: torch.dtype = torch.float32,
    batch_invariant: bool = False,
) -> Tensor:
    """The ``k`` entries of best :func:`~kernels.index_topk.reference.index_scores` for every query.

    query float32 [B, S, h, c], as rounded for the product; keys: packed rows; head_weights [B, S, h]; visible int64
    [B or 1, S]: how many entries, the first ones, each query may use. Returns int64 [B, S, k], best first, unused
    places -1. Memory does not grow with S beyond the result, and with the entries by a row of scores. No gradient.
    Scores are rounded to ``dtype`` before they are compared.

    ``batch_invariant`` gives every score the same bits whatever the other queries and the number of entries are: one
    query and a fixed number of rows at a time.
    """
    B, S, h, _ = query.shape
    limits = visible.expand(B, S)
    step = 1 if batch_invariant else min(_QUERIES, max(1, _SCORES // max(1, int(limits.max()))))
    chosen = query.new_empty(B, S, k, dtype=torch.int64)
    with in_float32(query):
        for b in range(B):
            for s in range(0, S, step):
                some, limit = slice(s, s + step), limits[b, s : s + step]
                q, weights, most = query[b, some].float(), head_weights[b, some].float(), int(limit.max())
                size = (
                    _INVARIANT_ROWS
                    if batch_invariant
                    else min(_MOST_ROWS, max(_INVARIANT_ROWS, _TILE_ELEMENTS // (len(q) * h)))
                )
                scores = query.new_empty(len(q), most, dtype=dtype)
                for begin in range(0, most, size):
                    places = torch.arange(begin, begin + size, device=query.device)
                    if not batch_invariant:
                        places = places[: most - begin]
                    sequence = torch.full((1,), b, device=query.device)
                    packed = keys.gather_of(sequence, places.clamp(max=most - 1)[None])
                    found = tile_scores(q, packed[0], weights, layout)
                    scores[:, begin : begin + size] = found[:, : most - begin]
                chosen[b, some] = best_visible(scores, limit, k)
    return chosen


def tile_scores(query: Tensor, packed: Tensor, head_weights: Tensor, layout: EntryLayout) -> Tensor:
    """query [s, h, c], packed keys uint8 [E, nbytes], head_weights [s, h] -> float32 [s, E]."""
    products = query.flatten(0, 1) @ unpack(packed, layout).t()
    return (products.unflatten(0, head_weights.shape).relu() * head_weights.unsqueeze(-1)).sum(1)


def best_visible(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """:func:`~kernels.index_topk.reference.best_places` of float [s, T] among the first ``visible`` (int64 [s])."""
    may = torch.arange(scores.shape[1], device=scores.device, dtype=torch.int32) < visible.unsqueeze(-1)
    return best_places(torch.where(may, scores, float("-inf")).float(), k)
