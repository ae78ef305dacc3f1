"""Triton kernels of gated pooling. See :mod:`kernels.compress.triton`.

A row of ``rows`` has W values and W gates, with W = 2 * C if blocks overlap, else C. ``SOURCE`` selects how
an entry's block is located: in adjacent blocks (``WHOLE``), at an index (``DOCUMENTS``, int64 [B, N] ``places``), or
after ``places`` [B] earlier tokens of a sequence, the newest of which are in a ring buffer (``RING``). Entries are
numbered over all sequences: entry t is entry t % N of sequence t // N.

``FINISH`` fuses the steps after the pooling: one program then has all channels of an entry.
"""

import triton
import triton.language as tl

from kernels.cache_io.triton_kernels import both, pack_row, round_row

WHOLE: tl.constexpr = tl.constexpr(0)
DOCUMENTS: tl.constexpr = tl.constexpr(1)
RING: tl.constexpr = tl.constexpr(2)


# --- the tokens of an entry


@triton.jit
def _locate(places, starts, b, e, N, S, skipped, M: tl.constexpr, SOURCE: tl.constexpr):
    """Return the first token of an entry's block, whether the block exists, whether the one before it belongs to the
    same document, and the number of tokens before ``rows``."""
    length = tl.full([], 0, tl.int64)
    if SOURCE == RING:
        length = tl.load(places + b)
        first = (length // M + e) * M
        exists = first + M <= length + S
        preceded = exists & (first > 0)
    elif SOURCE == DOCUMENTS:
        first = tl.load(places + b * N + e)
        exists = first >= 0
        preceded = exists & (tl.load(starts + b * N + e) == 0)
    else:
        first = (e + skipped) * M
        exists = first >= 0
        preceded = first > 0
    return first, exists, preceded, length


@triton.jit
def _block(
    rows, ring, bias, b, first, exists, length, channel, there, S, capacity,
    M: tl.constexpr, W: tl.constexpr, M_PAD: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """Return the offsets in ``rows`` of a block's values, which of them exist, its values and its gates with their
    biases: [M_PAD, channels]."""
    j = tl.arange(0, M_PAD)
    inside = both((j < M)[:, None] & there[None, :], exists)
    token = first + j.to(tl.int64)
    at = (b * S + token - length)[:, None] * (2 * W) + channel[None, :]
    if SOURCE == RING:
        kept = (token < length)[:, None]
        old = ring + (b * capacity + token % capacity)[:, None] * (2 * W) + channel[None, :]
        values = tl.load(rows + at, mask=inside & ~kept, other=0.0)
        values = tl.where(kept, tl.load(old, mask=inside & kept, other=0.0), values)
        gates = tl.load(rows + at + W, mask=inside & ~kept, other=float("-inf"))
        gates = tl.where(kept, tl.load(old + W, mask=inside & kept, other=float("-inf")), gates)
    else:
        values = tl.load(rows + at, mask=inside, other=0.0)
        gates = tl.load(rows + at + W, mask=inside, other=float("-inf"))
    return at, inside, values, gates + tl.load(bias + j[:, None] * W + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _weighted_sums(values, gates, peak):
    """Return the weights of a block's rows, the sums of the weights and of the weighted values."""
    p = tl.exp(gates - peak[None, :])
    return p, tl.sum(p, axis=0), tl.sum(p * values, axis=0)


# --- the steps after the pooling


@triton.jit
def _rotate(x, cos, sin, row, sign, C: tl.constexpr, R: tl.constexpr):
    """Rotate the last R pairs of x [N], of which C dims exist. A ``sign`` of -1 rotates back."""
    N: tl.constexpr = x.shape[0]
    pair = tl.arange(0, N // 2) - (C // 2 - R)
    inside = (pair >= 0) & (pair < R)
    a = tl.load(cos + row * R + pair, mask=inside, other=1.0)
    b = tl.load(sin + row * R + pair, mask=inside, other=0.0) * sign
    even, odd = tl.split(tl.reshape(x, [N // 2, 2]))
    first = tl.where(inside, even * a - odd * b, even)
    second = tl.where(inside, even * b + odd * a, odd)
    return tl.reshape(tl.join(first, second), [N])


@triton.jit
def _hadamard(x):
    """Rotate x [N], N a power of two, by the orthonormal Hadamard matrix.

    Each step adds and subtracts neighbors, and moves the lowest bit of the index to the top.
    """
    N: tl.constexpr = x.shape[0]
    for i in tl.static_range(20):
        if 2**i < N:
            first, second = tl.split(tl.reshape(x, [N // 2, 2]))
            x = tl.reshape(tl.trans(tl.join(first + second, first - second)), [N])
    return x * (1.0 / (N**0.5))


@triton.jit
def _finished(x, d, norm_weight, cos, sin, row, norm_eps, C: tl.constexpr, R: tl.constexpr, HADAMARD: tl.constexpr):
    """Return a pooled entry x [N] after its norm and rotations."""
    factor = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / C + norm_eps)
    x = _rotate(x * factor * tl.load(norm_weight + d, mask=d < C, other=0.0), cos, sin, row, 1.0, C, R)
    if HADAMARD:
        x = _hadamard(x)
    return x


@triton.jit
def _finished_backward(
    grad, x, d, norm_weight, cos, sin, row, norm_eps, C: tl.constexpr, R: tl.constexpr, HADAMARD: tl.constexpr
):
    """Return the gradients of a pooled entry x [N] and of the norm's weight."""
    if HADAMARD:
        grad = _hadamard(grad)
    grad = _rotate(grad, cos, sin, row, -1.0, C, R)
    factor = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / C + norm_eps)
    scaled = grad * tl.load(norm_weight + d, mask=d < C, other=0.0)
    back = factor * factor * factor * tl.sum(scaled * x, axis=0) / C
    return factor * scaled - back * x, grad * x * factor


@triton.jit
def _store_entry(
    x, d, places, page_table, out, b, e, t, exists, pages, page_rows,
    M: tl.constexpr, C: tl.constexpr, SOURCE: tl.constexpr,
    BODY: tl.constexpr, FORMAT: tl.constexpr, BODY_BYTES: tl.constexpr, ROPE: tl.constexpr,
    ROPE_FORMAT: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr, SCALE_OFFSET: tl.constexpr,
    NBYTES: tl.constexpr,
):  # fmt: skip
    """Store an entry x [N]: round it into row t of ``out``, or with ``RING`` pack it into its row in the pages of
    sequence b."""
    if SOURCE == RING:
        place = tl.load(places + b) // M + e
        page = tl.load(page_table + b * pages + place // page_rows, mask=exists, other=0)
        base = out + (page * page_rows + place % page_rows) * NBYTES
        pack_row(x, d, base, exists, BODY, FORMAT, BODY_BYTES, ROPE, ROPE_FORMAT, BLOCK, SCALES, SCALE_OFFSET, NBYTES)
    else:
        tl.store(out + t * C + d, round_row(x, d, BODY, FORMAT, ROPE_FORMAT, BLOCK), mask=d < C)


# --- kernels


@triton.jit
def forward(
    rows, ring, places, starts, bias, norm_weight, cos, sin, page_table, out,
    N, S, skipped, capacity, angle_rows, pages, page_rows, norm_eps,
    M: tl.constexpr, C: tl.constexpr, OVERLAP: tl.constexpr, SOURCE: tl.constexpr, FINISH: tl.constexpr,
    R: tl.constexpr, HADAMARD: tl.constexpr,
    BODY: tl.constexpr, FORMAT: tl.constexpr, BODY_BYTES: tl.constexpr, ROPE: tl.constexpr,
    ROPE_FORMAT: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr, SCALE_OFFSET: tl.constexpr,
    NBYTES: tl.constexpr, M_PAD: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pool the tokens of entries: to ``out`` [B, N, C], or with FINISH as :func:`_store_entry`. Program ids: entry,
    chunk of channels."""
    W: tl.constexpr = 2 * C if OVERLAP else C
    t = tl.program_id(0).to(tl.int64)
    b, e = t // N, t % N
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = channel < C
    first, exists, preceded, length = _locate(places, starts, b, e, N, S, skipped, M, SOURCE)
    _, _, values, gates = _block(
        rows, ring, bias, b, first, exists, length, channel + (W - C), there, S, capacity, M, W, M_PAD, SOURCE
    )
    peak = tl.max(gates, axis=0)
    if OVERLAP:
        _, _, old_values, old_gates = _block(
            rows, ring, bias, b, first - M, preceded, length, channel, there, S, capacity, M, W, M_PAD, SOURCE
        )
        peak = tl.maximum(peak, tl.max(old_gates, axis=0))
    peak = tl.where(there & exists, peak, 0.0)
    _, total, acc = _weighted_sums(values, gates, peak)
    if OVERLAP:
        _, old_total, old_acc = _weighted_sums(old_values, old_gates, peak)
        total += old_total
        acc += old_acc
    x = acc / tl.where(there & exists, total, 1.0)
    if FINISH:
        x = _finished(x, channel, norm_weight, cos, sin, b * angle_rows + e, norm_eps, C, R, HADAMARD)
        _store_entry(
            x, channel, places, page_table, out, b, e, t, exists, pages, page_rows, M, C, SOURCE,
            BODY, FORMAT, BODY_BYTES, ROPE, ROPE_FORMAT, BLOCK, SCALES, SCALE_OFFSET, NBYTES,
        )  # fmt: skip
    else:
        tl.store(out + t * C + channel, x, mask=there)


@triton.jit
def finish(
    pooled, places, norm_weight, cos, sin, page_table, out,
    N, S, angle_rows, pages, page_rows, norm_eps,
    M: tl.constexpr, C: tl.constexpr, SOURCE: tl.constexpr, R: tl.constexpr, HADAMARD: tl.constexpr,
    BODY: tl.constexpr, FORMAT: tl.constexpr, BODY_BYTES: tl.constexpr, ROPE: tl.constexpr,
    ROPE_FORMAT: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr, SCALE_OFFSET: tl.constexpr,
    NBYTES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Finish pooled entries [B, N, C]. A program has one entry."""
    t = tl.program_id(0).to(tl.int64)
    b, e = t // N, t % N
    d = tl.arange(0, BLOCK_C)
    exists = t >= 0
    if SOURCE == RING:
        _, exists, _, _ = _locate(places, places, b, e, N, S, 0, M, SOURCE)
    x = tl.load(pooled + t * C + d, mask=d < C, other=0.0)
    x = _finished(x, d, norm_weight, cos, sin, b * angle_rows + e, norm_eps, C, R, HADAMARD)
    _store_entry(
        x, d, places, page_table, out, b, e, t, exists, pages, page_rows, M, C, SOURCE,
        BODY, FORMAT, BODY_BYTES, ROPE, ROPE_FORMAT, BLOCK, SCALES, SCALE_OFFSET, NBYTES,
    )  # fmt: skip


@triton.jit
def finish_backward(
    pooled, norm_weight, cos, sin, grad_out, grad_pooled, weight_parts,
    N, total, angle_rows, norm_eps,
    C: tl.constexpr, R: tl.constexpr, HADAMARD: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the gradients of pooled entries and each program's partial gradient of the norm weight, [programs, C]."""
    first = tl.program_id(0).to(tl.int64) * ENTRIES
    d = tl.arange(0, BLOCK_C)
    weight_grad = tl.zeros([BLOCK_C], tl.float32)
    for t in range(first, tl.minimum(first + ENTRIES, total)):
        x = tl.load(pooled + t * C + d, mask=d < C, other=0.0)
        grad = tl.load(grad_out + t * C + d, mask=d < C, other=0.0)
        row = t // N * angle_rows + t % N
        grad, part = _finished_backward(grad, x, d, norm_weight, cos, sin, row, norm_eps, C, R, HADAMARD)
        tl.store(grad_pooled + t * C + d, grad, mask=d < C)
        weight_grad += part
    tl.store(weight_parts + tl.program_id(0).to(tl.int64) * C + d, weight_grad, mask=d < C)


@triton.jit
def _store_gradients(grad_rows, at, inside, p, values, pooled, grad, W: tl.constexpr):
    """Write the gradients of a block's values and gates from its normalized weights. Return those of the gates."""
    grad_gates = p * (values - pooled[None, :]) * grad[None, :]
    tl.store(grad_rows + at, p * grad[None, :], mask=inside)
    tl.store(grad_rows + at + W, grad_gates, mask=inside)
    return tl.where(inside, grad_gates, 0.0)


@triton.jit
def _store_zeros(grad_rows, at, inside, W: tl.constexpr, M_PAD: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write zeros for a block's channels that no entry pools."""
    zeros = tl.zeros([M_PAD, BLOCK_C], tl.float32)
    tl.store(grad_rows + at, zeros, mask=inside)
    tl.store(grad_rows + at + W, zeros, mask=inside)


@triton.jit
def backward(
    rows, places, starts, bias, norm_weight, cos, sin, grad_out, grad_rows, bias_parts, weight_parts,
    N, S, skipped, total, angle_rows, norm_eps,
    M: tl.constexpr, C: tl.constexpr, OVERLAP: tl.constexpr, SOURCE: tl.constexpr, FINISH: tl.constexpr,
    R: tl.constexpr, HADAMARD: tl.constexpr, ENTRIES: tl.constexpr, M_PAD: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the rows that ENTRIES entries pool. No two entries pool the same channels of a row.

    ``grad_out`` is that of the entries with FINISH, else of the pooled entries. The gradients of the biases and of the
    norm's weight are sums over entries: each program writes its part, [programs, M, W] and [programs, C].
    """
    W: tl.constexpr = 2 * C if OVERLAP else C
    begin = tl.program_id(0).to(tl.int64) * ENTRIES
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = channel < C
    own_bias = tl.zeros([M_PAD, BLOCK_C], tl.float32)
    old_bias = tl.zeros([M_PAD, BLOCK_C], tl.float32)
    weight_grad = tl.zeros([BLOCK_C], tl.float32)
    for t in range(begin, tl.minimum(begin + ENTRIES, total)):
        b, e = t // N, t % N
        first, exists, preceded, length = _locate(places, starts, b, e, N, S, skipped, M, SOURCE)
        at, inside, values, gates = _block(
            rows, rows, bias, b, first, exists, length, channel + (W - C), there, S, 1, M, W, M_PAD, SOURCE
        )
        peak = tl.max(gates, axis=0)
        if OVERLAP:
            old_at, old_inside, old_values, old_gates = _block(
                rows, rows, bias, b, first - M, preceded, length, channel, there, S, 1, M, W, M_PAD, SOURCE
            )
            peak = tl.maximum(peak, tl.max(old_gates, axis=0))
        peak = tl.where(there & exists, peak, 0.0)
        p, weights, x = _weighted_sums(values, gates, peak)
        if OVERLAP:
            old_p, old_weights, old_x = _weighted_sums(old_values, old_gates, peak)
            weights += old_weights
            x += old_x
        scale = 1.0 / tl.where(there & exists, weights, 1.0)
        x *= scale
        grad = tl.load(grad_out + t * C + channel, mask=there, other=0.0)
        if FINISH:
            row = b * angle_rows + e
            grad, part = _finished_backward(grad, x, channel, norm_weight, cos, sin, row, norm_eps, C, R, HADAMARD)
            weight_grad += part
        own_bias += _store_gradients(grad_rows, at, inside, p * scale[None, :], values, x, grad, W)
        if OVERLAP:
            old_p *= scale[None, :]
            old_bias += _store_gradients(grad_rows, old_at, old_inside, old_p, old_values, x, grad, W)
            if SOURCE == WHOLE:
                # No entry pools the first C channels of the last block, or the last C channels of a skipped first
                # block.
                _store_zeros(grad_rows, at - C, both(inside, e == N - 1), W, M_PAD, BLOCK_C)
                _store_zeros(grad_rows, old_at + C, both(old_inside, e == 0), W, M_PAD, BLOCK_C)
    j = tl.arange(0, M_PAD)
    part = (tl.program_id(0).to(tl.int64) * M + j)[:, None] * W + channel[None, :]
    inside = (j < M)[:, None] & there[None, :]
    tl.store(bias_parts + part + (W - C), own_bias, mask=inside)
    if OVERLAP:
        tl.store(bias_parts + part, old_bias, mask=inside)
    if FINISH:
        tl.store(weight_parts + tl.program_id(0).to(tl.int64) * C + channel, weight_grad, mask=there)
