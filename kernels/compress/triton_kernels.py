"""Triton kernels of gated pooling. See :mod:`kernels.compress.triton`.

A program pools a chunk of channels of one entry. ``OFFSET`` is the first channel of an entry's own block in a row of
``W`` values and ``W`` gates: c with overlap, else 0. Program ids: entry, chunk, sequence.
"""

import triton
import triton.language as tl


@triton.jit
def _block(rows, bias, place, first, channel, there, m, W, M_PAD: tl.constexpr):
    """Return the offsets in ``rows`` of a block's values, its values and its gates: [M_PAD, channels]."""
    j = tl.arange(0, M_PAD)
    inside = (j < m)[:, None] & there[None, :]
    at = (place * m + j.to(tl.int64))[:, None] * (2 * W) + (first + channel)[None, :]
    values = tl.load(rows + at, mask=inside, other=0.0)
    shift = tl.load(bias + j[:, None] * W + (first + channel)[None, :], mask=inside, other=0.0)
    gates = tl.load(rows + at + W, mask=inside, other=float("-inf")) + shift
    return at, inside, values, gates


@triton.jit
def _has_previous_block(starts, b, i, n, HAS_STARTS: tl.constexpr):
    """Return whether block i of a sequence belongs to the same document as the one before."""
    exists = i > 0
    if HAS_STARTS:
        exists = exists & (tl.load(starts + b * n + i) == 0)
    return exists


@triton.jit
def forward(
    rows, bias, starts, out,
    n, m, W, C, skipped,
    OFFSET_IS_C: tl.constexpr, HAS_STARTS: tl.constexpr, M_PAD: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write entries [B, n - skipped, C]."""
    i = tl.program_id(0) + skipped
    b = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = channel < C
    own = 0
    if OFFSET_IS_C:
        own = C
    _, _, values, gates = _block(rows, bias, b * n + i, own, channel, there, m, W, M_PAD)
    peak = tl.max(gates, axis=0)
    if OFFSET_IS_C:
        before = _has_previous_block(starts, b, i, n, HAS_STARTS)
        place = tl.where(before, b * n + i - 1, b * n + i)
        _, _, old_values, old_gates = _block(rows, bias, place, 0, channel, there, m, W, M_PAD)
        old_gates = tl.where(before, old_gates, float("-inf"))
        peak = tl.maximum(peak, tl.max(old_gates, axis=0))
    peak = tl.where(there, peak, 0.0)
    p = tl.exp(gates - peak[None, :])
    total = tl.sum(p, axis=0)
    acc = tl.sum(p * values, axis=0)
    if OFFSET_IS_C:
        p = tl.exp(old_gates - peak[None, :])
        total += tl.sum(p, axis=0)
        acc += tl.sum(p * old_values, axis=0)
    total = tl.where(there, total, 1.0)
    tl.store(out + (b * (n - skipped) + tl.program_id(0)) * C + channel, acc / total, mask=there)


@triton.jit
def _store_gradients(grad_rows, at, inside, p, values, out, grad, W):
    """Write the gradients of a block's values and gates from its normalized weights."""
    tl.store(grad_rows + at, p * grad[None, :], mask=inside)
    tl.store(grad_rows + at + W, p * (values - out[None, :]) * grad[None, :], mask=inside)


@triton.jit
def backward(
    rows, bias, starts, out, grad_out, grad_rows,
    n, m, W, C, skipped,
    OFFSET_IS_C: tl.constexpr, HAS_STARTS: tl.constexpr, M_PAD: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the rows that an entry pools. No two entries pool the same channels of a row."""
    i = tl.program_id(0) + skipped
    b = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = channel < C
    own = 0
    if OFFSET_IS_C:
        own = C
    at, inside, values, gates = _block(rows, bias, b * n + i, own, channel, there, m, W, M_PAD)
    peak = tl.max(gates, axis=0)
    before = i > 0
    if OFFSET_IS_C:
        before = _has_previous_block(starts, b, i, n, HAS_STARTS)
        place = tl.where(before, b * n + i - 1, b * n + i)
        old_at, old_inside, old_values, old_gates = _block(rows, bias, place, 0, channel, there, m, W, M_PAD)
        old_gates = tl.where(before, old_gates, float("-inf"))
        peak = tl.maximum(peak, tl.max(old_gates, axis=0))
    peak = tl.where(there, peak, 0.0)
    p = tl.exp(gates - peak[None, :])
    total = tl.sum(p, axis=0)
    if OFFSET_IS_C:
        old_p = tl.exp(old_gates - peak[None, :])
        total += tl.sum(old_p, axis=0)
    total = tl.where(there, total, 1.0)
    row = (b * (n - skipped) + tl.program_id(0)) * C + channel
    pooled = tl.load(out + row, mask=there, other=0.0)
    grad = tl.load(grad_out + row, mask=there, other=0.0)
    _store_gradients(grad_rows, at, inside, p / total[None, :], values, pooled, grad, W)
    if OFFSET_IS_C:
        old_inside = tl.where(before, old_inside.to(tl.int32), 0) != 0
        _store_gradients(grad_rows, old_at, old_inside, old_p / total[None, :], old_values, pooled, grad, W)
