"""Triton kernels of attention over packed rows. See :mod:`kernels.paged_attention.triton`.

Rows are dequantized in registers. The body's dims are computed in up to three pieces, ``P0``, ``P1`` and ``P2`` wide
(0 for absent ones), whose keys are unpacked one after the other. Logits have base 2.

With ``WORDS``, four E4M3 values are unpacked at a time to BF16 values that are too small by the factor ``SHIFT``.
Queries' bodies are multiplied by it beforehand, and the outputs' bodies at the end. E4M3 bits placed in a BF16 number
represent the value divided by 2 ** 120, because the exponent biases differ by 120. The scales are multiplied by
2 ** _OFFSET only, since a larger factor would exceed BF16's range.
"""

import triton
import triton.language as tl

from kernels.cache_io.triton_kernels import unpack_body, unpack_rope

_OFFSET: tl.constexpr = tl.constexpr(40)


@triton.jit
def _halves(pair, UPCAST: tl.constexpr):
    """Return the two BF16 numbers in int32 ``pair``; in float32 with ``UPCAST``."""
    if UPCAST:
        return (pair << 16).to(tl.float32, bitcast=True), ((pair >> 16) << 16).to(tl.float32, bitcast=True)
    low = pair.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return low, (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _unpack_words(
    base, there, START: tl.constexpr, WIDTH: tl.constexpr, BODY: tl.constexpr, BLOCK: tl.constexpr,
    SCALES: tl.constexpr, SCALE_OFFSET: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Unpack dims ``START`` to ``START + WIDTH`` of E4M3 bodies, divided by ``SHIFT``: BF16 [N, WIDTH]."""
    N: tl.constexpr = base.shape[0]
    place = START // 4 + tl.arange(0, WIDTH // 4)
    inside = there[:, None]
    if START + WIDTH > BODY:
        inside = there[:, None] & (place < BODY // 4)[None, :]
    word = tl.load(base.to(tl.pointer_type(tl.int32))[:, None] + place[None, :], mask=inside, other=0)
    # An E4M3 number is the sign, exponent and mantissa of BF16 with a gap: four bits of the exponent of eight.
    first, third = _halves(((word << 4) & 0x07F007F0) | ((word << 8) & -2147450880), UPCAST)
    second, fourth = _halves(((word >> 4) & 0x07F007F0) | (word & -2147450880), UPCAST)
    joined = tl.join(tl.join(first, third), tl.join(second, fourth))
    if SCALES == 1 or WIDTH <= BLOCK:
        code = tl.load(base + SCALE_OFFSET + (START // BLOCK if SCALES > 1 else 0), mask=there, other=0)
        return tl.reshape(joined, [N, WIDTH]) * _factor(code, joined.dtype)[:, None]
    block = START // BLOCK + tl.arange(0, WIDTH // BLOCK)
    known = there[:, None] & (block < SCALES)[None, :]
    code = tl.load((base + SCALE_OFFSET)[:, None] + block[None, :], mask=known, other=0)
    grouped = tl.reshape(joined, [N, WIDTH // BLOCK, BLOCK]) * _factor(code, joined.dtype)[:, :, None]
    return tl.reshape(grouped, [N, WIDTH])


@triton.jit
def _factor(code, dtype: tl.constexpr):
    """Return ``2 ** (code - 127 + _OFFSET)`` for a biased exponent."""
    exponent = tl.minimum(code.to(tl.int32) + _OFFSET, 254)
    return (exponent << 23).to(tl.float32, bitcast=True).to(dtype)


@triton.jit
def _piece(
    base, there, dtype: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, BODY: tl.constexpr,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr, SCALE_OFFSET: tl.constexpr, WORDS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Unpack a piece of the bodies of rows at pointers ``base`` [N]: [N, WIDTH]."""
    if WORDS:
        return _unpack_words(base, there, START, WIDTH, BODY, BLOCK, SCALES, SCALE_OFFSET, UPCAST).to(dtype)
    return unpack_body(base, there, START, WIDTH, BODY, FORMAT, BLOCK, SCALES, SCALE_OFFSET).to(dtype)


@triton.jit
def _accumulate(
    base, there, q0, q1, q2, q_rope, peak, total, acc0, acc1, acc2, rope, scale,
    BODY: tl.constexpr, FORMAT: tl.constexpr, BODY_BYTES: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    P2: tl.constexpr, ROPE: tl.constexpr, ROPE_FORMAT: tl.constexpr, ROPE_PAD: tl.constexpr, BLOCK: tl.constexpr,
    SCALES: tl.constexpr, SCALE_OFFSET: tl.constexpr, WORDS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add a tile of packed rows to the online softmax."""
    t: tl.constexpr = q0.dtype
    k0 = _piece(base, there, t, 0, P0, BODY, FORMAT, BLOCK, SCALES, SCALE_OFFSET, WORDS, UPCAST)
    logits = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if P1 > 0:
        k1 = _piece(base, there, t, P0, P1, BODY, FORMAT, BLOCK, SCALES, SCALE_OFFSET, WORDS, UPCAST)
        logits = tl.dot(q1, tl.trans(k1), logits, input_precision="ieee")
    if P2 > 0:
        k2 = _piece(base, there, t, P0 + P1, P2, BODY, FORMAT, BLOCK, SCALES, SCALE_OFFSET, WORDS, UPCAST)
        logits = tl.dot(q2, tl.trans(k2), logits, input_precision="ieee")
    if ROPE > 0:
        r = unpack_rope(base, there, ROPE, ROPE_PAD, ROPE_FORMAT, BODY_BYTES).to(t)
        logits = tl.dot(q_rope, tl.trans(r), logits, input_precision="ieee")
    logits = tl.where(there[None, :], logits * scale, float("-inf"))
    new = tl.maximum(peak, tl.max(logits, axis=1))
    fade = tl.exp2(peak - new)
    p = tl.exp2(logits - new[:, None])
    total = total * fade + tl.sum(p, axis=1)
    p = p.to(t)
    acc0 = tl.dot(p, k0, acc0 * fade[:, None], input_precision="ieee")
    if P1 > 0:
        acc1 = tl.dot(p, k1, acc1 * fade[:, None], input_precision="ieee")
    if P2 > 0:
        acc2 = tl.dot(p, k2, acc2 * fade[:, None], input_precision="ieee")
    if ROPE > 0:
        rope = tl.dot(p, r, rope * fade[:, None], input_precision="ieee")
    return new, total, acc0, acc1, acc2, rope


@triton.jit
def _query(query, row, exists, START: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr, SIZE: tl.constexpr,
           UPCAST: tl.constexpr):  # fmt: skip
    """Load dims ``START`` to ``END`` of queries, padded to ``WIDTH``: [H, WIDTH]."""
    d = START + tl.arange(0, WIDTH)
    q = tl.load(query + row[:, None] * SIZE + d[None, :], mask=exists[:, None] & (d < END)[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    return q


@triton.jit
def _store(parts, part, exists, acc, START: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr, VALUES: tl.constexpr):
    """Store dims ``START`` to ``END`` of the sums, as far as values have them."""
    d = START + tl.arange(0, WIDTH)
    tl.store(parts + part[:, None] + d[None, :], acc, mask=exists[:, None] & ((d < END) & (d < VALUES))[None, :])


@triton.jit
def partial_attention(
    query, rows, offsets, first, storage, page_table, chosen, visible, parts, stats,
    S, H, R, window, offset_stride, first_stride, page_size, P, K, visible_stride, splits, scale,
    NBYTES: tl.constexpr, BODY: tl.constexpr, FORMAT: tl.constexpr, BODY_BYTES: tl.constexpr, P0: tl.constexpr,
    P1: tl.constexpr, P2: tl.constexpr, ROPE: tl.constexpr, ROPE_FORMAT: tl.constexpr, ROPE_PAD: tl.constexpr,
    BLOCK: tl.constexpr, SCALES: tl.constexpr, SCALE_OFFSET: tl.constexpr, WORDS: tl.constexpr, SHIFT: tl.constexpr,
    VALUES: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_ENTRIES: tl.constexpr, HAS_CHOSEN: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the attention over every ``splits``-th tile of keys: sums that are not normalized, peaks and totals.

    Program ids: split, query of the batch, group of heads.
    """
    split = tl.program_id(0)
    b = tl.program_id(1) // S
    s = tl.program_id(1) % S
    head = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    exists = head < H
    row = tl.program_id(1).to(tl.int64) * H + head
    W1: tl.constexpr = P1 if P1 > 0 else 16
    W2: tl.constexpr = P2 if P2 > 0 else 16
    SIZE: tl.constexpr = BODY + ROPE
    q0 = _query(query, row, exists, 0, P0, BODY, SIZE, UPCAST)
    q1 = _query(query, row, exists, P0, W1, BODY, SIZE, UPCAST)
    q2 = _query(query, row, exists, P0 + P1, W2, BODY, SIZE, UPCAST)
    q_rope = _query(query, row, exists, BODY, ROPE_PAD, SIZE, SIZE, UPCAST)
    peak = tl.full([BLOCK_H], -1e30, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc0 = tl.zeros([BLOCK_H, P0], tl.float32)
    acc1 = tl.zeros([BLOCK_H, W1], tl.float32)
    acc2 = tl.zeros([BLOCK_H, W2], tl.float32)
    rope = tl.zeros([BLOCK_H, ROPE_PAD], tl.float32)
    n = tl.arange(0, BLOCK_N)
    begin = split
    if HAS_WINDOW:
        tiles = tl.cdiv(window, BLOCK_N)
        last = tl.load(first + b * first_stride) + s
        offset = tl.load(offsets + b * offset_stride)
        for tile in range(split, tiles, splits):
            back = tile * BLOCK_N + n
            position = last - window + 1 + back
            seen = (position >= 0) & (back < window)
            # The remainder of a negative number is negative.
            place = tl.where(seen, ((position - offset) % R + R) % R, 0)
            base = rows + (b.to(tl.int64) * R + place) * NBYTES
            peak, total, acc0, acc1, acc2, rope = _accumulate(
                base, seen, q0, q1, q2, q_rope, peak, total, acc0, acc1, acc2, rope, scale,
                BODY, FORMAT, BODY_BYTES, P0, P1, P2, ROPE, ROPE_FORMAT, ROPE_PAD, BLOCK, SCALES, SCALE_OFFSET, WORDS,
                UPCAST,
            )  # fmt: skip
        begin = (split + splits - tiles % splits) % splits
    if HAS_ENTRIES:
        count = K
        if not HAS_CHOSEN:
            count = tl.load(visible + b * visible_stride + s).to(tl.int32)
        for tile in range(begin, tl.cdiv(count, BLOCK_N), splits):
            slot = tile * BLOCK_N + n
            if HAS_CHOSEN:
                entry = tl.load(chosen + tl.program_id(1).to(tl.int64) * K + slot, mask=slot < K, other=-1)
            else:
                entry = tl.where(slot < count, slot, -1)
            seen = (entry >= 0) & (entry < P * page_size)
            entry = tl.where(seen, entry, 0)
            page = tl.load(page_table + b * P + entry // page_size, mask=seen, other=0)
            base = storage + (page * page_size + entry % page_size) * NBYTES
            peak, total, acc0, acc1, acc2, rope = _accumulate(
                base, seen, q0, q1, q2, q_rope, peak, total, acc0, acc1, acc2, rope, scale,
                BODY, FORMAT, BODY_BYTES, P0, P1, P2, ROPE, ROPE_FORMAT, ROPE_PAD, BLOCK, SCALES, SCALE_OFFSET, WORDS,
                UPCAST,
            )  # fmt: skip
    part = (split.to(tl.int64) * tl.num_programs(1) * H + row) * VALUES
    _store(parts, part, exists, acc0 * SHIFT, 0, P0, BODY, VALUES)
    if P1 > 0:
        _store(parts, part, exists, acc1 * SHIFT, P0, P1, BODY, VALUES)
    if P2 > 0:
        _store(parts, part, exists, acc2 * SHIFT, P0 + P1, P2, BODY, VALUES)
    if ROPE > 0:
        _store(parts, part, exists, rope, BODY, ROPE_PAD, BODY + ROPE, VALUES)
    stat = (split.to(tl.int64) * tl.num_programs(1) * H + row) * 2
    tl.store(stats + stat, peak, mask=exists)
    tl.store(stats + stat + 1, total, mask=exists)


@triton.jit
def combine(
    parts, stats, sink, out, rows, H, splits, VALUES: tl.constexpr, VALUES_PAD: tl.constexpr
):  # fmt: skip
    """Combine the splits of one head of one query, and its sink."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, VALUES_PAD)
    bias = tl.load(sink + row % H)
    peak = tl.maximum(bias, -1e30)
    for split in range(splits):
        peak = tl.maximum(peak, tl.load(stats + (split * rows + row) * 2))
    total = tl.exp2(bias - peak)
    acc = tl.zeros([VALUES_PAD], tl.float32)
    for split in range(splits):
        at = split * rows + row
        fade = tl.exp2(tl.load(stats + at * 2) - peak)
        total += tl.load(stats + at * 2 + 1) * fade
        acc += tl.load(parts + at * VALUES + d, mask=d < VALUES, other=0.0) * fade
    tl.store(out + row * VALUES + d, acc / total, mask=d < VALUES)
