"""Selection of entries, from packed keys in tiles that are unpacked and scored while they are in the cache, and within
whole sequences by blocks of queries."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.autocast import in_float32
from kernels.cache_io import EntryLayout, Pages, unpack
from kernels.entry_ranges import EntryRanges
from kernels.index_scores import index_scores
from kernels.index_topk.selection import select_topk, topk_indices

_MAX_SCORES = 1 << 22
"""Maximum number of scores per group of several queries, [queries, entries]."""
_MAX_QUERIES = 64
"""Maximum number of queries per group."""
_TILE_PRODUCTS = 1 << 20
"""Products of a tile of keys, [queries * heads, entries], within the bounds on its rows."""
_MIN_TILE_ROWS, _MAX_TILE_ROWS = 1024, 16384
_MAX_BLOCK_SCORES, _MAX_BLOCK_SCORES_ON_GPU = 1 << 22, 1 << 26
"""Maximum number of scores per block of several queries of whole sequences."""


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
    """Implement :func:`kernels.index_topk.index_topk`.

    Batch-invariant scores are computed for one query and a fixed number of rows at a time.
    """
    B, S, h, _ = query.shape
    limits = visible.expand(B, S)
    step = 1 if batch_invariant else min(_MAX_QUERIES, max(1, _MAX_SCORES // max(1, int(limits.max()))))
    chosen = query.new_empty(B, S, k, dtype=torch.int64)
    with in_float32(query):
        for b in range(B):
            for s in range(0, S, step):
                group, limit = slice(s, s + step), limits[b, s : s + step]
                q, weights, most = query[b, group].float(), head_weights[b, group].float(), int(limit.max())
                size = _MIN_TILE_ROWS
                if not batch_invariant:
                    size = min(_MAX_TILE_ROWS, max(_MIN_TILE_ROWS, _TILE_PRODUCTS // (len(q) * h)))
                scores = query.new_empty(len(q), most, dtype=dtype)
                for begin in range(0, most, size):
                    indices = torch.arange(begin, begin + size, device=query.device)
                    if not batch_invariant:
                        indices = indices[: most - begin]
                    sequence = torch.full((1,), b, device=query.device)
                    packed = keys.gather_from(sequence, indices.clamp(max=most - 1)[None])
                    tile = score_tile(q, packed[0], weights, layout)
                    scores[:, begin : begin + size] = tile[:, : most - begin]
                chosen[b, group] = _select_visible(scores, limit, k)
    return chosen


def score_tile(query: Tensor, packed: Tensor, head_weights: Tensor, layout: EntryLayout) -> Tensor:
    """Return the scores of packed keys uint8 [E, nbytes] for query [s, h, c], head_weights [s, h]: float32 [s, E]."""
    products = query.flatten(0, 1) @ unpack(packed, layout).t()
    return (products.unflatten(0, head_weights.shape).relu() * head_weights.unsqueeze(-1)).sum(1)


def _select_visible(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """Return the ``k`` best of scores, float [s, T], among the first ``visible``, int64 [s]: int64 [s, k]."""
    permitted = torch.arange(scores.shape[1], device=scores.device, dtype=torch.int32) < visible.unsqueeze(-1)
    return topk_indices(torch.where(permitted, scores, float("-inf")).float(), k)


@torch.no_grad()
def select_entries(
    query: Tensor, keys: Tensor, head_weights: Tensor, visible: EntryRanges, k: int, dtype: torch.dtype
) -> Tensor:
    """Implement :func:`kernels.index_topk.select_entries`."""
    (B, S), T = query.shape[:2], keys.shape[1]
    step = max(1, (_MAX_BLOCK_SCORES if query.is_cpu else _MAX_BLOCK_SCORES_ON_GPU) // (B * T))
    pieces = []
    for begin in range(0, S, step):
        queries = slice(begin, begin + step)
        permitted = visible.of(queries).mask(T)
        scores = index_scores(query[:, queries], keys, head_weights[:, queries], permitted)
        pieces.append(select_topk(scores.to(dtype), permitted, k))
    return torch.cat(pieces, dim=1)
