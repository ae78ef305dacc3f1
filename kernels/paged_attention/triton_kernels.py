"""Triton kernels of attention over packed rows. See :mod:`kernels.paged_attention.triton`.

Rows are dequantized in registers. Body and rope dims are padded to powers of two separately. Logits have base 2.
"""

import triton
import triton.language as tl

from kernels.cache_io.triton_kernels import unpack_body, unpack_rope


@triton.jit
def _accumulate(
    base, there, seen, q_body, q_rope, peak, total, body, rope, scale,
    BODY: tl.constexpr, FORMAT: tl.constexpr, BODY_BYTES: tl.constexpr, BODY_PAD: tl.constexpr, ROPE: tl.constexpr,
    ROPE_FORMAT: tl.constexpr, ROPE_PAD: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
):  # fmt: skip
    """Add a tile of packed rows to the online softmax."""
    k = unpack_body(base, there, BODY, BODY_PAD, FORMAT, BLOCK, SCALES, SCALE_OFFSET).to(q_body.dtype)
    logits = tl.dot(q_body, tl.trans(k), input_precision="ieee")
    if ROPE > 0:
        r = unpack_rope(base, there, ROPE, ROPE_PAD, ROPE_FORMAT, BODY_BYTES).to(q_body.dtype)
        logits = tl.dot(q_rope, tl.trans(r), logits, input_precision="ieee")
    logits = tl.where(seen[None, :], logits * scale, float("-inf"))
    new = tl.maximum(peak, tl.max(logits, axis=1))
    fade = tl.exp2(peak - new)
    p = tl.exp2(logits - new[:, None])
    total = total * fade + tl.sum(p, axis=1)
    p = p.to(q_body.dtype)
    body = tl.dot(p, k, body * fade[:, None], input_precision="ieee")
    if ROPE > 0:
        rope = tl.dot(p, r, rope * fade[:, None], input_precision="ieee")
    return new, total, body, rope


@triton.jit
def partial_attention(
    query, rows, offsets, first, storage, page_table, chosen, visible, parts, stats,
    S, H, R, window, offset_stride, first_stride, page_size, P, K, visible_stride, splits, scale,
    NBYTES: tl.constexpr, BODY: tl.constexpr, FORMAT: tl.constexpr, BODY_BYTES: tl.constexpr, BODY_PAD: tl.constexpr,
    ROPE: tl.constexpr, ROPE_FORMAT: tl.constexpr, ROPE_PAD: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr,
    SCALE_OFFSET: tl.constexpr, VALUES: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_ENTRIES: tl.constexpr,
    HAS_CHOSEN: tl.constexpr, UPCAST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
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
    d = tl.arange(0, BODY_PAD)
    r = tl.arange(0, ROPE_PAD)
    at = row[:, None] * (BODY + ROPE)
    q_body = tl.load(query + at + d[None, :], mask=exists[:, None] & (d < BODY)[None, :], other=0.0)
    q_rope = tl.load(query + at + BODY + r[None, :], mask=exists[:, None] & (r < ROPE)[None, :], other=0.0)
    if UPCAST:
        q_body, q_rope = q_body.to(tl.float32), q_rope.to(tl.float32)
    peak = tl.full([BLOCK_H], -1e30, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    body = tl.zeros([BLOCK_H, BODY_PAD], tl.float32)
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
            peak, total, body, rope = _accumulate(
                base, seen, seen, q_body, q_rope, peak, total, body, rope, scale,
                BODY, FORMAT, BODY_BYTES, BODY_PAD, ROPE, ROPE_FORMAT, ROPE_PAD, BLOCK, SCALES, SCALE_OFFSET,
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
            peak, total, body, rope = _accumulate(
                base, seen, seen, q_body, q_rope, peak, total, body, rope, scale,
                BODY, FORMAT, BODY_BYTES, BODY_PAD, ROPE, ROPE_FORMAT, ROPE_PAD, BLOCK, SCALES, SCALE_OFFSET,
            )  # fmt: skip
    part = (split.to(tl.int64) * tl.num_programs(1) * H + row)[:, None] * VALUES
    tl.store(parts + part + d[None, :], body, mask=exists[:, None] & ((d < BODY) & (d < VALUES))[None, :])
    if ROPE > 0:
        kept = exists[:, None] & ((r < ROPE) & (BODY + r < VALUES))[None, :]
        tl.store(parts + part + BODY + r[None, :], rope, mask=kept)
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
