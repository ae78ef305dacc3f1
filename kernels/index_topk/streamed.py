"""Selection straight from packed keys: tiles of them are unpacked, scored and forgotten while they are in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cache_io import EntryLayout, PagedRows, unpack, unpack_integers
from kernels.cpu import has_amx
from kernels.formats import scaled_integers
from kernels.index_topk.reference import best_places

_SCORES = 1 << 22
"""Scores that are held at once, [queries, entries]: with more entries fewer queries are taken together."""
_QUERIES = 64
_TILE_ELEMENTS = 1 << 20
"""Products of a tile, [queries * heads, entries], that are unpacked and forgotten together."""
_LEAST_ROWS, _MOST_ROWS = 1024, 16384


def index_topk(
    query: Tensor,
    rows: PagedRows,
    layout: EntryLayout,
    head_weights: Tensor,
    visible: list[int],
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    fixed_shapes: bool = False,
    one_by_one: bool = False,
    score: Callable[[Tensor, Tensor, Tensor, EntryLayout], Tensor] | None = None,
    choose: Callable[[Tensor, Tensor, int], Tensor] | None = None,
) -> Tensor:
    """The ``k`` entries of best :func:`~kernels.index_topk.reference.index_scores` for every query of one sequence.

    query float32 [S, h, c], as rounded for the product; rows: packed keys [T, layout.nbytes]; head_weights [S, h];
    visible: how many entries, the first ones, each query may use. int64 [S, k], unused places -1. Memory does not
    grow with S beyond the result, and with T by a row of scores. No gradient. Scores are rounded to ``dtype`` before
    they are compared.

    ``score`` and ``choose`` replace :func:`tile_scores` and :func:`best_visible` (compiled forms of them); with
    ``fixed_shapes`` they are only ever called with powers of two of queries and rows. ``one_by_one``, with fixed
    shapes, gives every score the same bits whatever the other queries and T are: one query, and the fewest rows, at a
    time.
    """
    score, choose = score or tile_scores, choose or best_visible
    longest = max(1, *visible)
    step = 1 if one_by_one else min(_QUERIES, _power_of_two(max(1, _SCORES // longest)))
    pieces = []
    with torch.no_grad(), exact_in_bf16(layout):
        for s in range(0, len(visible), step):
            q, w, most = query[s : s + step], head_weights[s : s + step].float(), max(visible[s : s + step])
            S, h = w.shape
            if fixed_shapes and S not in (1, step):
                q, w = F.pad(q, (0, 0, 0, 0, 0, step - S)), F.pad(w, (0, 0, 0, step - S))
            size = _LEAST_ROWS
            if not one_by_one:
                size = min(_MOST_ROWS, max(size, _power_of_two(_TILE_ELEMENTS // (len(q) * h))))
                while size > _LEAST_ROWS and size // 2 >= most:
                    size //= 2
            width = most
            if fixed_shapes:
                width = size
                while width < (most if one_by_one else longest):  # as step does: no more pairs of them than needed
                    width *= 2
            scores = query.new_empty(len(q), width, dtype=dtype)
            for begin in range(0, most, size):
                end = begin + size
                packed = rows.at_least(begin, end) if fixed_shapes else rows.slice(begin, min(end, most))
                scores[:, begin:end] = score(q, packed, w, layout)
            limits = visible[s : s + step] + [0] * (len(q) - S)
            pieces.append(choose(scores, torch.tensor(limits, device=query.device), k)[:S])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def tile_scores(query: Tensor, packed: Tensor, head_weights: Tensor, layout: EntryLayout) -> Tensor:
    """query [s, h, c], packed keys uint8 [E, nbytes], head_weights [s, h] -> float32 [s, E]."""
    flat = query.flatten(0, 1)
    whole = multiplies_integers(layout) and query.device.type == "cpu"
    products = _integer_products(flat, packed, layout) if whole else flat @ unpack(packed, layout).t()
    return (products.unflatten(0, head_weights.shape).relu() * head_weights.unsqueeze(-1)).sum(1)


def _integer_products(query: Tensor, packed: Tensor, layout: EntryLayout) -> Tensor:
    """``query @ keys.t()``, float32 [n, E], for FP4 values on both sides: within a block they are integers times a
    power of two, whose products and sums are exact, and which a CPU without AMX multiplies four times as fast as
    float32."""
    integers, scales = scaled_integers(query, layout.block)
    key_integers, key_scales = unpack_integers(packed, layout)
    products = []
    for block, begin in enumerate(range(0, layout.body, layout.block)):
        dims = slice(begin, begin + layout.block)
        product = torch._int_mm(integers[:, dims].contiguous(), key_integers[:, dims].t())
        products.append(product * (scales[:, block : block + 1] / 4) * key_scales[:, block])
    return torch.stack(products).sum(0) if len(products) > 1 else products[0]


def multiplies_integers(layout: EntryLayout) -> bool:
    """Whether a CPU scores these keys as integers: FP4 ones, unless it has AMX. That multiplies BF16 so fast that
    putting the blocks' integer products together would cost more than it saves: of 16 queries with 64 heads and 1,024
    keys of 128 dims five times as much."""
    return layout.body_format == "fp4" and not has_amx()


def best_visible(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """:func:`~kernels.index_topk.reference.best_places` of float [s, T] among the first ``visible`` (int64 [s])."""
    may = torch.arange(scores.shape[1], device=scores.device, dtype=torch.int32) < visible.unsqueeze(-1)
    return best_places(torch.where(may, scores, float("-inf")).float(), k)


def _power_of_two(n: int) -> int:
    """The largest that is not more than n."""
    return 1 << n.bit_length() - 1


@contextmanager
def exact_in_bf16(layout: EntryLayout) -> Iterator[None]:
    """Let a CPU multiply in BF16 units where keys, and queries rounded like them, fit these exactly: BF16, and E4M3 or
    E2M1 times a power of two do, and sums are kept in float32 either way. PyTorch has one such setting for the whole
    process: float32 products of other threads may run in BF16 meanwhile, too."""
    if layout.body_format == "fp32" or multiplies_integers(layout):
        yield
        return
    _bf16_units.enter()
    try:
        yield
    finally:
        _bf16_units.leave()


class _Bf16Units:
    """The setting of the process, changed by the first thread that needs it and put back by the last."""

    def __init__(self) -> None:
        self._lock, self._users, self._before = Lock(), 0, "none"

    def enter(self) -> None:
        matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        with self._lock:
            if not self._users:
                self._before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                torch.backends.mkldnn.matmul.fp32_precision = self._before  # type: ignore[attr-defined]


_bf16_units = _Bf16Units()
