"""Triton kernels of the indexer's loss. See :mod:`kernels.indexer_kl.triton`.

Constants are at least 2 ** -126: Triton 3.6 takes smaller ones for float64.
Products have keys as rows, so that sums over heads run mostly within a thread. Offsets that grow with tokens are int64.
``UPCAST`` converts operands to float32, for the interpreter, which multiplies BF16 wrongly.
"""

import triton
import triton.language as tl


@triton.jit
def _query(query, head_weights, row, h, C: tl.constexpr, DIMS: tl.constexpr, HEADS: tl.constexpr, UPCAST: tl.constexpr):
    """Load one query [HEADS, DIMS] and its head weights [HEADS]."""
    head = tl.arange(0, HEADS)
    d = tl.arange(0, DIMS)
    inside = (head < h)[:, None] & (d < C)[None, :]
    q = tl.load(query + (row * h + head)[:, None] * C + d[None, :], mask=inside, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    return q, tl.load(head_weights + row * h + head, mask=head < h, other=0.0)


@triton.jit
def _keys(keys, entry, there, C: tl.constexpr, DIMS: tl.constexpr, UPCAST: tl.constexpr):
    """Load keys ``entry`` [N]: [N, DIMS]; zeros for keys that are not there."""
    d = tl.arange(0, DIMS)
    inside = there[:, None] & (d < C)[None, :]
    k = tl.load(keys + entry.to(tl.int64)[:, None] * C + d[None, :], mask=inside, other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
    return k


@triton.jit
def _tile(begin, chosen, low, end, T, HAS_CHOSEN: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return slots [N], their entries, and which of them the query may use."""
    slot = begin + tl.arange(0, BLOCK_N)
    if HAS_CHOSEN:
        entry = tl.load(chosen + slot, mask=slot < end, other=-1)
        return slot, entry, (entry >= 0) & (entry < T)
    return slot, slot, (slot >= low) & (slot < end)


@triton.jit
def divergence(
    query, keys, head_weights, mass, chosen, firsts, ends, value, gradient, grad_query, grad_keys, grad_weights,
    begin_query, count, S, T, width, h, range_stride,
    C: tl.constexpr, DIMS: tl.constexpr, HEADS: tl.constexpr, HAS_CHOSEN: tl.constexpr, STORE: tl.constexpr,
    ADD: tl.constexpr, MIN_MASS: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the divergence of one of ``count`` queries from ``begin_query``.

    ``mass`` [B, count, width] and all outputs are those of these queries. Also writes the gradients of the query and
    its head weights, and either that of the scores to ``gradient`` [B, count, width] (``STORE``), or adds that of the
    keys to ``grad_keys`` [B, T, C] (``ADD``). Program ids: query, sequence.
    """
    b = tl.program_id(1).to(tl.int64)
    s = begin_query + tl.program_id(0)
    row = b * S + s
    own = b * count + tl.program_id(0)
    q, w = _query(query, head_weights, row, h, C, DIMS, HEADS, UPCAST)
    low = s * 0
    start = s * 0
    end = width
    if not HAS_CHOSEN:
        low = tl.load(firsts + b * range_stride + s)
        end = tl.load(ends + b * range_stride + s)
        start = low // BLOCK_N * BLOCK_N
    own_mass = mass + own * width
    own_gradient = gradient + own * width
    own_chosen = chosen + row * width
    base = keys + b * T * C
    # Every lane has a softmax of its own until the end.
    peak = tl.full([BLOCK_N], -1e30, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    teacher = tl.zeros([BLOCK_N], tl.float32)
    entropy = tl.zeros([BLOCK_N], tl.float32)
    crossed = tl.zeros([BLOCK_N], tl.float32)
    for begin in range(start, end, BLOCK_N):
        slot, entry, seen = _tile(begin, own_chosen, low, end, T, HAS_CHOSEN, BLOCK_N)
        k = _keys(base, entry, seen, C, DIMS, UPCAST)
        products = tl.maximum(tl.dot(k, tl.trans(q), input_precision="ieee"), 0.0)
        score = tl.sum(products * w[None, :], axis=1)
        t = tl.load(own_mass + slot, mask=seen, other=0.0)
        teacher += t
        entropy += tl.where(t > 0, t * tl.log(tl.maximum(t, 1e-37)), 0.0)
        crossed += t * score
        new = tl.maximum(peak, tl.where(seen, score, -1e30))
        total = total * tl.exp(peak - new) + tl.where(seen, tl.exp(score - new), 0.0)
        peak = new
    highest = tl.max(peak, axis=0)
    summed = tl.sum(total * tl.exp(peak - highest), axis=0)
    known = summed > 0  # False without any permitted entry
    log_sum = tl.where(known, highest + tl.log(tl.maximum(summed, 1e-37)), 0.0)
    all_mass = tl.sum(teacher, axis=0)
    floor = tl.maximum(all_mass, MIN_MASS)
    share = all_mass / floor
    found = (tl.sum(entropy, axis=0) - tl.sum(crossed, axis=0)) / floor + share * (log_sum - tl.log(floor))
    tl.store(value + own, tl.where(known, found, 0.0))
    if STORE or ADD:
        grad_q = tl.zeros([HEADS, DIMS], tl.float32)
        grad_w = tl.zeros([BLOCK_N, HEADS], tl.float32)
        d = tl.arange(0, DIMS)
        head = tl.arange(0, HEADS)
        for begin in range(start, end, BLOCK_N):
            slot, entry, seen = _tile(begin, own_chosen, low, end, T, HAS_CHOSEN, BLOCK_N)
            k = _keys(base, entry, seen, C, DIMS, UPCAST)
            products = tl.maximum(tl.dot(k, tl.trans(q), input_precision="ieee"), 0.0)
            score = tl.sum(products * w[None, :], axis=1)
            t = tl.load(own_mass + slot, mask=seen, other=0.0)
            g = tl.where(seen, share * tl.exp(score - log_sum) - t / floor, 0.0)
            grad_w += products * g[:, None]
            upstream = tl.where(products > 0, w[None, :] * g[:, None], 0.0).to(k.dtype)
            grad_q = tl.dot(tl.trans(upstream), k, grad_q, input_precision="ieee")
            if STORE:
                tl.store(own_gradient + slot, g, mask=seen)
            if ADD:
                grad_k = tl.dot(upstream, q, input_precision="ieee")
                at = grad_keys + (b * T + entry.to(tl.int64))[:, None] * C + d[None, :]
                tl.atomic_add(at, grad_k, mask=seen[:, None] & (d < C)[None, :], sem="relaxed")
        inside = (head < h)[:, None] & (d < C)[None, :]
        tl.store(grad_query + (own * h + head)[:, None] * C + d[None, :], grad_q, mask=inside)
        tl.store(grad_weights + own * h + head, tl.sum(grad_w, axis=0), mask=head < h)


@triton.jit
def key_gradients(
    query, keys, head_weights, gradient, starts, stops, parts,
    begin_query, count, S, T, h, bound_stride,
    C: tl.constexpr, DIMS: tl.constexpr, HEADS: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a tile of keys as parts [splits, B, T, C]. Program ids: tile, split of queries, sequence.

    ``gradient`` [B, count, T] is that of the scores of the queries from ``begin_query``. Those from ``starts`` to
    ``stops`` [B or 1, tiles] see the tile; a split is an even part of them.
    """
    b = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    slot = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = slot < T
    k = _keys(keys + b * T * C, slot, there, C, DIMS, UPCAST)
    bound = b * bound_stride + tl.program_id(0)
    start = tl.load(starts + bound)
    stop = tl.load(stops + bound)
    size = tl.cdiv(tl.maximum(stop - start, 0), tl.num_programs(1))
    first = start + split * size
    acc = tl.zeros([BLOCK_N, DIMS], tl.float32)
    for own in range(first, tl.minimum(first + size, stop)):
        row = b * S + begin_query + own
        q, w = _query(query, head_weights, row, h, C, DIMS, HEADS, UPCAST)
        g = tl.load(gradient + (b * count + own) * T + slot, mask=there, other=0.0)
        products = tl.dot(k, tl.trans(q), input_precision="ieee")
        upstream = tl.where(products > 0, w[None, :] * g[:, None], 0.0).to(k.dtype)
        acc = tl.dot(upstream, q, acc, input_precision="ieee")
    d = tl.arange(0, DIMS)
    at = parts + ((split * tl.num_programs(2) + b) * T + slot)[:, None] * C + d[None, :]
    tl.store(at, acc, mask=there[:, None] & (d < C)[None, :])
