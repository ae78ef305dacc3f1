"""Triton kernels of attention within whole sequences. See :mod:`kernels.sparse_attention.triton`.

A program computes ``BLOCK_Q`` consecutive queries and ``BLOCK_H`` heads: row r is head ``r % BLOCK_H`` of query
``r // BLOCK_H``, so that all heads of a query multiply one tile of keys. ``BLOCK_Q`` is 1 for chosen entries, which
differ between queries. Keys are the window's rows, then the entries. Logits have base 2. Sums are float32.

``MODE`` is 0 without entries, 1 for chosen entries, 2 for ranges of entries. Offsets that grow with tokens are int64.
``UPCAST`` converts operands to float32, for the interpreter, which multiplies BF16 wrongly.
"""

import triton
import triton.language as tl

NONE: tl.constexpr = tl.constexpr(0)
CHOSEN: tl.constexpr = tl.constexpr(1)
RANGE: tl.constexpr = tl.constexpr(2)


@triton.jit
def _rows(S, H, first, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr):
    """Return the queries, heads and offsets (in rows of [S, H]) of the program's rows, and which of them exist."""
    r = tl.arange(0, BLOCK_Q * BLOCK_H)
    s = first + r // BLOCK_H
    head = tl.program_id(1) * BLOCK_H + r % BLOCK_H
    exists = (s < S) & (head < H)
    b = tl.program_id(2).to(tl.int64)
    return s, head, (b * S + s) * H + head, exists


@triton.jit
def _window_mask(j, s, limit, past):
    """Return which keys j [N] of the window the queries s [M] see."""
    age = (past + s)[:, None] - j[None, :]
    return (age >= 0) & (age < limit[:, None]) & (j >= 0)[None, :]


@triton.jit
def _entry_range(firsts, ends, s, S, K, range_stride, MODE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the entries that the rows see, from low [M] to high [M], and the slots that the program visits: all
    chosen ones, or whole tiles with all entries that its queries see."""
    if MODE == RANGE:
        at = tl.program_id(2).to(tl.int64) * range_stride + s
        low = tl.load(firsts + at, mask=s < S, other=2147483647)
        high = tl.load(ends + at, mask=s < S, other=0)
        return low, high, tl.min(low, axis=0) // BLOCK_N * BLOCK_N, tl.max(high, axis=0)
    return s * 0, s * 0, tl.program_id(0) * 0, K


@triton.jit
def _entry_tile(begin, s, first, exists, chosen, low, high, S, T, K, MODE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return entries [N], which of them exist [N], and which the rows see [M, N], of the tile from slot ``begin``."""
    b = tl.program_id(2).to(tl.int64)
    slot = begin + tl.arange(0, BLOCK_N)
    if MODE == CHOSEN:
        row = tl.load(chosen + (b * S + first) * K + slot, mask=slot < K, other=-1)
        there = (row >= 0) & (row < T)
        seen = there[None, :] & exists[:, None]
    else:
        row = slot
        there = slot < T
        seen = (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None]) & there[None, :] & exists[:, None]
    return row, there, seen


@triton.jit
def _keys(base, row, there, d, D: tl.constexpr, UPCAST: tl.constexpr):
    """Load keys ``row`` [N], dims d: [N, dims]; zeros for keys that are not there."""
    tile = tl.load(base + row.to(tl.int64)[:, None] * D + d[None, :], mask=there[:, None], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _accumulate(q, k, seen, peak, total, acc, scale, UPCAST: tl.constexpr):
    """Add a tile of keys to the online softmax."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    logits = tl.where(seen, logits, float("-inf"))
    new = tl.maximum(peak, tl.max(logits, axis=1))
    fade = tl.exp2(peak - new)
    p = tl.exp2(logits - new[:, None])
    total = total * fade + tl.sum(p, axis=1)
    acc = tl.dot(p.to(k.dtype), k, acc * fade[:, None], input_precision="ieee")
    return new, total, acc


@triton.jit
def forward(
    query, window_kv, entries, chosen, firsts, ends, sink, reach, out, log_sum,
    S, H, past, window, T, K, range_stride, scale,
    D: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_REACH: tl.constexpr, MODE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the output and the base-2 logarithm of every softmax's sum."""
    first = tl.program_id(0) * BLOCK_Q
    b = tl.program_id(2).to(tl.int64)
    s, head, row, exists = _rows(S, H, first, BLOCK_Q, BLOCK_H)
    d = tl.arange(0, D)
    q = tl.load(query + row[:, None] * D + d[None, :], mask=exists[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    bias = tl.load(sink + head, mask=head < H, other=0.0)
    peak = tl.maximum(bias, -1e30)  # stays finite without a sink
    total = tl.exp2(bias - peak)
    acc = tl.zeros([BLOCK_Q * BLOCK_H, D], dtype=tl.float32)
    if HAS_WINDOW:
        limit = s * 0 + window
        if HAS_REACH:
            limit = tl.minimum(limit, tl.load(reach + b * S + s, mask=s < S, other=1))
        base = window_kv + b * (past + S) * D
        oldest = past + first - window + 1
        for begin in range(oldest, tl.minimum(past + first + BLOCK_Q, past + S), BLOCK_N):
            j = begin + tl.arange(0, BLOCK_N)
            k = _keys(base, j, (j >= 0) & (j < past + S), d, D, UPCAST)
            seen = _window_mask(j, s, limit, past) & exists[:, None]
            peak, total, acc = _accumulate(q, k, seen, peak, total, acc, scale, UPCAST)
    if MODE != NONE:
        base = entries + b * T * D
        low, high, start, end = _entry_range(firsts, ends, s, S, K, range_stride, MODE, BLOCK_N)
        for begin in range(start, end, BLOCK_N):
            entry, there, seen = _entry_tile(begin, s, first, exists, chosen, low, high, S, T, K, MODE, BLOCK_N)
            k = _keys(base, entry, there, d, D, UPCAST)
            peak, total, acc = _accumulate(q, k, seen, peak, total, acc, scale, UPCAST)
    acc = acc / total[:, None]
    tl.store(out + row[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=exists[:, None])
    tl.store(log_sum + row, peak + tl.log2(total), mask=exists)


@triton.jit
def entry_mass(
    query, entries, chosen, firsts, ends, log_sum, mass,
    begin_query, count, S, H, T, K, range_stride, scale,
    D: tl.constexpr, MODE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the attention mass of the entries, summed over heads, for ``count`` queries from ``begin_query``, which
    are those of ``query`` and ``mass``. Program ids: query block, 0, sequence.

    Further groups of heads add to what the program has stored for the first.
    """
    own_first = tl.program_id(0) * BLOCK_Q
    first = begin_query + own_first
    b = tl.program_id(2).to(tl.int64)
    r = tl.arange(0, BLOCK_Q * BLOCK_H)
    own = own_first + r // BLOCK_H
    s = begin_query + own
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK_N)
    queries = own_first + tl.arange(0, BLOCK_Q)
    width = T
    if MODE == CHOSEN:
        width = K
    out = mass + (b * count + queries)[:, None] * width
    base = entries + b * T * D
    low, high, start, end = _entry_range(firsts, ends, s, S, K, range_stride, MODE, BLOCK_N)
    for group in range(0, tl.cdiv(H, BLOCK_H)):
        head = group * BLOCK_H + r % BLOCK_H
        exists = (own < count) & (head < H)
        row = (b * count + own) * H + head
        q = tl.load(query + row[:, None] * D + d[None, :], mask=exists[:, None], other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        sums = tl.load(log_sum + (b * S + s) * H + head, mask=exists, other=0.0)
        for begin in range(start, end, BLOCK_N):
            entry, there, seen = _entry_tile(begin, s, first, exists, chosen, low, high, S, T, K, MODE, BLOCK_N)
            k = tl.trans(_keys(base, entry, there, d, D, UPCAST))
            p = tl.exp2(tl.dot(q, k, input_precision="ieee") * scale - sums[:, None])
            p = tl.where(seen, p, 0.0)
            summed = tl.sum(tl.reshape(p, [BLOCK_Q, BLOCK_H, BLOCK_N]), axis=1)
            inside = (queries < count)[:, None] & (begin + n < width)[None, :]
            at = out + (begin + n)[None, :]
            if group > 0:
                summed += tl.load(at, mask=inside, other=0.0)
            tl.store(at, summed, mask=inside)
    nothing = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    for begin in range(0, tl.minimum(start, width), BLOCK_N):
        inside = (queries < count)[:, None] & (begin + n < width)[None, :]
        tl.store(out + (begin + n)[None, :], nothing, mask=inside)
    rest = start + tl.cdiv(tl.maximum(end - start, 0), BLOCK_N) * BLOCK_N
    for begin in range(rest, width, BLOCK_N):
        inside = (queries < count)[:, None] & (begin + n < width)[None, :]
        tl.store(out + (begin + n)[None, :], nothing, mask=inside)


@triton.jit
def _weights(q0, q1, g0, g1, k0, k1, seen, sums, inner, scale, factor):
    """Return the gradient of a tile's logits and the attention weights. Operands are halves of the dims."""
    logits = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    logits = tl.dot(q1, tl.trans(k1), logits, input_precision="ieee") * scale
    p = tl.where(seen, tl.exp2(logits - sums[:, None]), 0.0)
    upstream = tl.dot(g0, tl.trans(k0), input_precision="ieee")
    upstream = tl.dot(g1, tl.trans(k1), upstream, input_precision="ieee")
    grad = p * (upstream - inner[:, None]) * factor
    return grad.to(k0.dtype), p.to(k0.dtype)


@triton.jit
def _add_keys(target, row, there, grad, p, q, g, d, D: tl.constexpr, ATOMIC: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Add to rows of a gradient, or store as parts of it, half of the dims of a tile's keys.

    A transposed product has dims as its rows, enough of them for the widest matrix instructions.
    """
    if TRANSPOSED:
        half = tl.dot(tl.trans(q), grad, input_precision="ieee")
        half = tl.trans(tl.dot(tl.trans(g), p, half, input_precision="ieee"))
    else:
        half = tl.dot(tl.trans(grad), q, input_precision="ieee")
        half = tl.dot(tl.trans(p), g, half, input_precision="ieee")
    ptr = target + row.to(tl.int64)[:, None] * D + d[None, :]
    if ATOMIC:
        tl.atomic_add(ptr, half, mask=there[:, None], sem="relaxed")
    else:
        tl.store(ptr, half, mask=there[:, None])


@triton.jit
def backward(
    query, window_kv, entries, chosen, firsts, ends, reach, grad_out, log_sum, inner, grad_query, grad_window,
    grad_entries, parts,
    begin_query, S, H, past, window, T, K, range_stride, window_slots, slots, scale, factor,
    D: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_REACH: tl.constexpr, MODE: tl.constexpr, UPCAST: tl.constexpr,
    ATOMIC: tl.constexpr, OF_QUERY: tl.constexpr, OF_KEYS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the gradient of queries (``OF_QUERY``) and add those of keys (``OF_KEYS``).

    The latter go to ``grad_window`` and ``grad_entries``, or to ``parts`` [programs, slots, D], which has a row for
    every key that a program visits: those of the window, then entries.
    """
    first = begin_query + tl.program_id(0) * BLOCK_Q
    b = tl.program_id(2).to(tl.int64)
    s, _head, row, exists = _rows(S, H, first, BLOCK_Q, BLOCK_H)
    program = (b * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    d0 = tl.arange(0, D // 2)
    d1 = D // 2 + d0
    at0 = row[:, None] * D + d0[None, :]
    at1 = at0 + D // 2
    q0 = tl.load(query + at0, mask=exists[:, None], other=0.0)
    q1 = tl.load(query + at1, mask=exists[:, None], other=0.0)
    g0 = tl.load(grad_out + at0, mask=exists[:, None], other=0.0)
    g1 = tl.load(grad_out + at1, mask=exists[:, None], other=0.0)
    if UPCAST:
        q0, q1, g0, g1 = q0.to(tl.float32), q1.to(tl.float32), g0.to(tl.float32), g1.to(tl.float32)
    sums = tl.load(log_sum + row, mask=exists, other=0.0)
    delta = tl.load(inner + row, mask=exists, other=0.0)
    grad0 = tl.zeros([BLOCK_Q * BLOCK_H, D // 2], dtype=tl.float32)
    grad1 = tl.zeros([BLOCK_Q * BLOCK_H, D // 2], dtype=tl.float32)
    slot = tl.arange(0, BLOCK_N)
    own = parts + program * slots * D
    if HAS_WINDOW:
        limit = s * 0 + window
        if HAS_REACH:
            limit = tl.minimum(limit, tl.load(reach + b * S + s, mask=s < S, other=1))
        base = window_kv + b * (past + S) * D
        oldest = past + first - window + 1
        for begin in range(0, window_slots, BLOCK_N):
            j = oldest + begin + slot
            there = (j >= 0) & (j < past + S)
            k0 = _keys(base, j, there, d0, D, UPCAST)
            k1 = _keys(base, j, there, d1, D, UPCAST)
            seen = _window_mask(j, s, limit, past) & exists[:, None]
            grad, p = _weights(q0, q1, g0, g1, k0, k1, seen, sums, delta, scale, factor)
            if OF_QUERY:
                grad0 = tl.dot(grad, k0, grad0, input_precision="ieee")
                grad1 = tl.dot(grad, k1, grad1, input_precision="ieee")
            if OF_KEYS:
                if ATOMIC:
                    target = grad_window + b * (past + S) * D
                    place = j
                else:
                    target = own
                    place = begin + slot
                _add_keys(target, place, there, grad, p, q0, g0, d0, D, ATOMIC, not OF_QUERY)
                _add_keys(target, place, there, grad, p, q1, g1, d1, D, ATOMIC, not OF_QUERY)
    if MODE != NONE:
        base = entries + b * T * D
        low, high, start, end = _entry_range(firsts, ends, s, S, K, range_stride, MODE, BLOCK_N)
        for begin in range(start, end, BLOCK_N):
            entry, there, seen = _entry_tile(begin, s, first, exists, chosen, low, high, S, T, K, MODE, BLOCK_N)
            k0 = _keys(base, entry, there, d0, D, UPCAST)
            k1 = _keys(base, entry, there, d1, D, UPCAST)
            grad, p = _weights(q0, q1, g0, g1, k0, k1, seen, sums, delta, scale, factor)
            if OF_QUERY:
                grad0 = tl.dot(grad, k0, grad0, input_precision="ieee")
                grad1 = tl.dot(grad, k1, grad1, input_precision="ieee")
            if OF_KEYS:
                if ATOMIC:
                    target = grad_entries + b * T * D
                    place = entry
                else:
                    target = own
                    place = window_slots + begin + slot
                _add_keys(target, place, there, grad, p, q0, g0, d0, D, ATOMIC, not OF_QUERY)
                _add_keys(target, place, there, grad, p, q1, g1, d1, D, ATOMIC, not OF_QUERY)
    if OF_QUERY:
        tl.store(grad_query + at0, grad0.to(grad_query.dtype.element_ty), mask=exists[:, None])
        tl.store(grad_query + at1, grad1.to(grad_query.dtype.element_ty), mask=exists[:, None])


@triton.jit
def sum_parts(parts, order, offsets, target, D: tl.constexpr):
    """Add, in the order of the list, the parts of one row of a gradient: ``order[offsets[row] : offsets[row + 1]]``."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    summed = tl.load(target + row * D + d)
    for i in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        summed += tl.load(parts + tl.load(order + i) * D + d)
    tl.store(target + row * D + d, summed)
