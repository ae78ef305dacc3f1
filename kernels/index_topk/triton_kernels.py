"""Triton kernels of the selection of entries. See :mod:`kernels.index_topk.triton`."""

import triton
import triton.language as tl

from kernels.cache_io.triton_kernels import round_to_bf16, unpack_body


@triton.jit
def score(
    query, head_weights, storage, page_table, firsts, ends, scores,
    begin, count, S, h, page_size, P, visible_stride, n,
    NBYTES: tl.constexpr, BODY: tl.constexpr, FORMAT: tl.constexpr, BODY_PAD: tl.constexpr, BLOCK: tl.constexpr,
    SCALES: tl.constexpr, SCALE_OFFSET: tl.constexpr, HEADS: tl.constexpr, HAS_FIRST: tl.constexpr,
    ROUND: tl.constexpr, UPCAST: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the scores of a tile of keys for ``QUERIES`` of the ``count`` queries from ``begin``: [B, count, n].

    A tile is unpacked once. The sum over heads runs along the columns of the products, mostly within a thread. Tiles
    that no query sees are skipped, and their scores are not written. Program ids: tile, group of queries, sequence.
    """
    b = tl.program_id(2)
    first = begin + tl.program_id(1) * QUERIES
    last = tl.minimum(first + QUERIES, begin + count)
    slot = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    near = first + tl.arange(0, QUERIES)
    limit = tl.max(tl.load(ends + b * visible_stride + near, mask=near < last, other=0), axis=0)
    low = limit * 0
    if HAS_FIRST:
        low = tl.min(tl.load(firsts + b * visible_stride + near, mask=near < last, other=2147483647), axis=0)
    if (tl.program_id(0) * BLOCK_N < limit) & (tl.program_id(0) * BLOCK_N + BLOCK_N > low):
        there = slot < limit
        page = tl.load(page_table + b * P + slot // page_size, mask=there, other=0)
        base = storage + (page * page_size + slot % page_size) * NBYTES
        k = unpack_body(base, there, 0, BODY_PAD, BODY, FORMAT, BLOCK, SCALES, SCALE_OFFSET).to(query.dtype.element_ty)
        if UPCAST:
            k = k.to(tl.float32)
        head = tl.arange(0, HEADS)
        d = tl.arange(0, BODY_PAD)
        inside = (head < h)[:, None] & (d < BODY)[None, :]
        for s in range(first, last):
            row = b.to(tl.int64) * S + s
            q = tl.load(query + (row * h + head)[:, None] * BODY + d[None, :], mask=inside, other=0.0)
            if UPCAST:
                q = q.to(tl.float32)
            w = tl.load(head_weights + row * h + head, mask=head < h, other=0.0)
            products = tl.dot(k, tl.trans(q), input_precision="ieee")
            total = tl.sum(tl.maximum(products, 0.0) * w[None, :], axis=1)
            if ROUND:
                total = round_to_bf16(total)
            out = scores + (b.to(tl.int64) * count + s - begin) * n
            tl.store(out + slot, total, mask=slot < n)


@triton.jit
def _ordered(score):
    """Return signed integers in the order of float32 scores; -0.0 equals 0.0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _keys(scores, begin, low, limit, TILE: tl.constexpr):
    """Load a tile of scores: as unsigned keys in their order (int64, below 2 ** 32), and which may be selected.

    Rows of scores are whole tiles, which are loaded without a mask: it would split the loads.
    """
    at = begin + tl.arange(0, TILE)
    value = tl.load(scores + at)
    return value, _ordered(value).to(tl.int64) + 2147483648, (at >= low) & (at < limit) & (value > float("-inf"))


@triton.jit
def select(
    scores, indices, firsts, ends, best, chosen,
    stride, n, segment, k, limit_stride, limit_width, begin, out_stride,
    HAS_INDICES: tl.constexpr, HAS_FIRST: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the ``k`` best scores of a segment of a row and their indices; equal scores in the order of the indices.

    Finds the k-th best key by four passes over its bytes, then copies all better ones and the first equal ones. Unused
    slots of [WIDTH] are -inf and -1. Rows are ``stride`` scores, of which the first n count. ``stride`` and ``segment``
    are multiples of ``TILE``. Program ids: row, segment.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * segment
    limit = tl.minimum(start + segment, n)
    low = start
    if not HAS_INDICES:
        query = row // limit_width * limit_stride + begin + row % limit_width
        limit = tl.minimum(limit, tl.load(ends + query).to(tl.int32))
        if HAS_FIRST:
            low = tl.maximum(low, tl.load(firsts + query).to(tl.int32))
            start = tl.maximum(start, low // TILE * TILE)
    own = scores + row * stride
    bins = tl.arange(0, 256)
    wanted = row * 0
    prefix = row * 0
    for i in range(4):
        shift = 24 - 8 * i
        counts = tl.zeros([256], tl.int32)
        for tile in range(start, limit, TILE):
            value, key, valid = _keys(own, tile, low, limit, TILE)
            inside = valid & ((key >> shift >> 8) == prefix)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=inside)
        above = tl.cumsum(counts, axis=0, reverse=True)
        if i == 0:
            wanted = tl.minimum(tl.sum(counts, axis=0), k).to(tl.int64)
        byte = tl.sum((above >= wanted).to(tl.int32), axis=0) - 1
        wanted -= tl.sum(tl.where(bins > byte, counts, 0), axis=0)
        prefix = prefix * 256 + byte
    # The first ``wanted`` keys that equal ``prefix`` belong to the selection; all greater ones do.
    out = row * out_stride + tl.program_id(1) * WIDTH
    taken = row * 0
    equals = row * 0
    for tile in range(start, limit, TILE):
        value, key, valid = _keys(own, tile, low, limit, TILE)
        at = tile + tl.arange(0, TILE)
        index = at
        if HAS_INDICES:
            index = tl.load(indices + row * stride + at)
        equal = valid & (key == prefix)
        rank = equals + tl.cumsum(equal.to(tl.int32), axis=0)
        kept = (valid & (key > prefix)) | (equal & (rank <= wanted))
        place = taken + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(best + out + place, value, mask=kept)
        tl.store(chosen + out + place, index, mask=kept)
        equals += tl.sum(equal.to(tl.int32), axis=0)
        taken += tl.sum(kept.to(tl.int32), axis=0)
    rest = tl.arange(0, WIDTH)
    tl.store(best + out + rest, float("-inf") + tl.zeros([WIDTH], tl.float32), mask=rest >= taken)
    tl.store(chosen + out + rest, tl.full([WIDTH], -1, tl.int32), mask=rest >= taken)


@triton.jit
def order(best, chosen, out, S, begin, count, k, WIDTH: tl.constexpr):
    """Write the selected indices [B, S, k], best first, with ties in the order of the indices. Program id: row."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, WIDTH)
    value = tl.load(best + row * WIDTH + slot)
    index = tl.load(chosen + row * WIDTH + slot)
    key = _ordered(value).to(tl.int64) * 2147483648 + (2147483647 - index.to(tl.int64))
    key = tl.where(index < 0, -9223372036854775807, key)
    key = tl.sort(key, descending=True)
    found = 2147483647 - (key & 2147483647)
    found = tl.where(key == -9223372036854775807, -1, found)
    tl.store(out + ((row // count) * S + begin + row % count) * k + slot, found, mask=slot < k)
