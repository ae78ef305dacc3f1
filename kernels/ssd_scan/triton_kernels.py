"""Triton kernels of the state-space scan. See :mod:`kernels.ssd_scan.triton` and the formulas in
:mod:`kernels.ssd_scan.eager`.

A chunk has ``L`` tokens. Rows are tokens of the batch: row b * S + t. ``states`` and ``grad_states`` are [batch,
chunks + 1, H, P, N]: the states before every chunk and after the last one, and their gradients. Offsets that grow with
tokens are int64. ``share`` heads have the same B and C.
"""

import triton
import triton.language as tl

MIN_LOG_DECAY: tl.constexpr = tl.constexpr(-104.0)
"""exp of less is zero in float32. The bound limits the rounding of differences between cumulative sums."""


@triton.jit
def _chunk(dt, A, positions, b, chunk, h, S, H, HAS_POSITIONS: tl.constexpr, L: tl.constexpr):
    """Return for the tokens of a chunk: rows, which of them exist, steps, logarithms of the decays from the chunk's
    begin up to and including each token, and the number of documents that begin up to and including each token."""
    t = chunk * L + tl.arange(0, L)
    there = t < S
    row = b * S + t.to(tl.int64)
    step = tl.load(dt + row * H + h, mask=there, other=0.0)
    logs = tl.cumsum(tl.maximum(step * tl.load(A + h), MIN_LOG_DECAY), axis=0)
    document = tl.zeros([L], tl.int32)
    if HAS_POSITIONS:
        starts = tl.load(positions + row, mask=there, other=1) == 0
        document = tl.cumsum(starts.to(tl.int32), axis=0)
    return row, there, step, logs, document


@triton.jit
def _last(x, L: tl.constexpr):
    """Return the last of L values."""
    return tl.sum(tl.where(tl.arange(0, L) == L - 1, x, 0), axis=0)


@triton.jit
def _since_begin(logs, document):
    """Return the decays from the chunk's begin to each token; 0 if the token's document begins in the chunk."""
    return tl.where(document == 0, tl.exp(logs), 0.0)


@triton.jit
def _until_end(logs, document, L: tl.constexpr):
    """Return the decays from each token to the chunk's end; 0 if another document begins in between."""
    return tl.where(document == _last(document, L), tl.exp(_last(logs, L) - logs), 0.0)


@triton.jit
def _between(logs, document, L: tl.constexpr):
    """Return the decays from token j to token i >= j of the same document [i, j], and 0 elsewhere."""
    i = tl.arange(0, L)
    seen = (i[:, None] >= i[None, :]) & (document[:, None] == document[None, :])
    return tl.exp(tl.where(seen, logs[:, None] - logs[None, :], float("-inf")))


@triton.jit
def _tile(base, row, there, stride, column, width):
    """Load columns of rows, [rows, columns]; zeros where there are none."""
    inside = there[:, None] & (column < width)[None, :]
    return tl.load(base + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _state(b, place, h, p, n, S, H, P, N, L: tl.constexpr):
    """Return the offsets of part of a state [P, N], and which of them exist."""
    first = ((b * (tl.cdiv(S, L) + 1) + place) * H + h) * P * N
    return first + p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]


@triton.jit
def carry(
    rows, columns, dt, A, positions, start, states,
    S, H, share, P, N, row_stride, column_stride,
    REVERSE: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write part of all states of a head, one chunk after another, from ``start`` [batch, H, P, N].

    ``rows`` are x, ``columns`` B. With ``REVERSE``, write the gradients of the states from the last one, given as
    ``start``, to the first: ``rows`` are the gradients of y, ``columns`` C. Program ids: part, head, sequence.
    """
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    parts = tl.cdiv(N, BLOCK_N)
    p = tl.program_id(0) // parts * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (p < P)[:, None] & (n < N)[None, :]
    state = tl.load(start + (b * H + h) * P * N + p[:, None] * N + n[None, :], mask=inside, other=0.0)
    chunks = tl.cdiv(S, L)
    for i in range(0, chunks):
        chunk = i
        place = i
        if REVERSE:
            chunk = chunks - 1 - i
            place = chunks - i
        at, inside = _state(b, place, h, p, n, S, H, P, N, L)
        tl.store(states + at, state, mask=inside)
        row, there, step, logs, document = _chunk(dt, A, positions, b, chunk, h, S, H, HAS_POSITIONS, L)
        if REVERSE:
            weight = _since_begin(logs, document)
        else:
            weight = _until_end(logs, document, L) * step
        x = _tile(rows + h * P, row, there, row_stride, p, P) * weight[:, None]
        y = _tile(columns + h // share * N, row, there, column_stride, n, N)
        kept = _last(_since_begin(logs, document), L)
        state = tl.dot(tl.trans(x), y, state * kept, input_precision=PRECISION)
    place = chunks
    if REVERSE:
        place = 0
    at, inside = _state(b, place, h, p, n, S, H, P, N, L)
    tl.store(states + at, state, mask=inside)


@triton.jit
def outputs(
    x, dt, A, B, C, D, positions, states, y,
    S, H, share, P, N, x_stride, B_stride, C_stride,
    HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr, P_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write y of one chunk and head. Program ids: chunk, head, sequence."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row, there, step, logs, document = _chunk(dt, A, positions, b, chunk, h, S, H, HAS_POSITIONS, L)
    p = tl.arange(0, P_PAD)
    products = tl.zeros([L, L], tl.float32)
    carried = tl.zeros([L, P_PAD], tl.float32)
    for begin in range(0, N, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        c = _tile(C + h // share * N, row, there, C_stride, n, N)
        products = tl.dot(
            c, tl.trans(_tile(B + h // share * N, row, there, B_stride, n, N)), products, input_precision=PRECISION
        )
        at, inside = _state(b, chunk, h, p, n, S, H, P, N, L)
        carried = tl.dot(c, tl.trans(tl.load(states + at, mask=inside, other=0.0)), carried, input_precision=PRECISION)
    weights = products * _between(logs, document, L) * step[None, :]
    own = _tile(x + h * P, row, there, x_stride, p, P)
    out = carried * _since_begin(logs, document)[:, None] + tl.load(D + h) * own
    out = tl.dot(weights, own, out, input_precision=PRECISION)
    tl.store(y + (row * H + h)[:, None] * P + p[None, :], out, mask=there[:, None] & (p < P)[None, :])


@triton.jit
def token_gradients(
    x, dt, A, B, C, D, positions, states, grad_states, y, grad_y, grad_x, grad_dt, grad_logs, grad_D,
    S, H, share, P, N, x_stride, B_stride, C_stride,
    HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr, P_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the gradients of x, dt and dt * A of one chunk and head, and the chunk's part of that of D.

    Decays enter y and the state after the chunk only as exp(logs[i] - logs[j]). The gradient of logs[i] is therefore
    the product of y[i], without the skip connection, with its gradient, less the product of dt[i] * x[i] with its
    gradient. That of the chunk's end is the product of the state after the chunk with its gradient. Program ids: chunk,
    head, sequence.
    """
    chunk, h = tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row, there, step, logs, document = _chunk(dt, A, positions, b, chunk, h, S, H, HAS_POSITIONS, L)
    p = tl.arange(0, P_PAD)
    products = tl.zeros([L, L], tl.float32)
    stepped = tl.zeros([L, P_PAD], tl.float32)  # gradient of dt * x
    through_end = tl.zeros([P_PAD], tl.float32)
    for begin in range(0, N, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        inputs = _tile(B + h // share * N, row, there, B_stride, n, N)
        products = tl.dot(
            _tile(C + h // share * N, row, there, C_stride, n, N), tl.trans(inputs), products, input_precision=PRECISION
        )
        at, inside = _state(b, chunk + 1, h, p, n, S, H, P, N, L)
        after = tl.load(grad_states + at, mask=inside, other=0.0)
        stepped = tl.dot(inputs, tl.trans(after), stepped, input_precision=PRECISION)
        through_end += tl.sum(after * tl.load(states + at, mask=inside, other=0.0), axis=1)
    weights = products * _between(logs, document, L)
    upstream = _tile(grad_y + h * P, row, there, H * P, p, P)
    stepped = tl.dot(
        tl.trans(weights), upstream, stepped * _until_end(logs, document, L)[:, None], input_precision=PRECISION
    )
    skip = tl.load(D + h)
    at = (row * H + h)[:, None] * P + p[None, :]
    inside = there[:, None] & (p < P)[None, :]
    tl.store(grad_x + at, stepped * step[:, None] + skip * upstream, mask=inside)
    own = _tile(x + h * P, row, there, x_stride, p, P)
    tl.store(grad_D + (b * tl.num_programs(0) + chunk) * H + h, tl.sum(tl.sum(own * upstream, axis=1), axis=0))
    grad_step = tl.sum(own * stepped, axis=1)
    read = _tile(y + h * P, row, there, H * P, p, P) - skip * own
    grad_log = tl.sum(read * upstream, axis=1) - step * grad_step
    grad_log = tl.cumsum(grad_log, axis=0, reverse=True) + tl.sum(through_end, axis=0)
    rate = tl.load(A + h)
    grad_log = tl.where(step * rate > MIN_LOG_DECAY, grad_log, 0.0)
    if HAS_POSITIONS:
        grad_log = tl.where(tl.load(positions + row, mask=there, other=1) == 0, 0.0, grad_log)
    tl.store(grad_dt + row * H + h, grad_step + rate * grad_log, mask=there)
    tl.store(grad_logs + row * H + h, grad_log, mask=there)


@triton.jit
def group_gradients(
    x, dt, A, B, C, positions, states, grad_states, grad_y, grad_B, grad_C,
    S, H, share, P, N, x_stride, B_stride, C_stride,
    HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write part of the gradients of B and C of one chunk and group, summed over its heads. Program ids: chunk, part,
    sequence."""
    chunk = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    parts = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(1) // parts
    n = tl.program_id(1) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    weights = tl.zeros([L, L], tl.float32)
    of_B = tl.zeros([L, BLOCK_N], tl.float32)
    of_C = tl.zeros([L, BLOCK_N], tl.float32)
    for h in range(group * share, (group + 1) * share):
        row, there, step, logs, document = _chunk(dt, A, positions, b, chunk, h, S, H, HAS_POSITIONS, L)
        products = tl.zeros([L, L], tl.float32)
        for begin in range(0, P, BLOCK_P):
            p = begin + tl.arange(0, BLOCK_P)
            own = _tile(x + h * P, row, there, x_stride, p, P) * step[:, None]
            upstream = _tile(grad_y + h * P, row, there, H * P, p, P)
            products = tl.dot(upstream, tl.trans(own), products, input_precision=PRECISION)
            at, inside = _state(b, chunk, h, p, n, S, H, P, N, L)
            before = tl.load(states + at, mask=inside, other=0.0)
            of_C = tl.dot(upstream * _since_begin(logs, document)[:, None], before, of_C, input_precision=PRECISION)
            at, inside = _state(b, chunk + 1, h, p, n, S, H, P, N, L)
            after = tl.load(grad_states + at, mask=inside, other=0.0)
            of_B = tl.dot(own * _until_end(logs, document, L)[:, None], after, of_B, input_precision=PRECISION)
        weights += products * _between(logs, document, L)
    t = chunk * L + tl.arange(0, L)
    there = t < S
    row = b * S + t.to(tl.int64)
    inputs = _tile(B + group * N, row, there, B_stride, n, N)
    read = _tile(C + group * N, row, there, C_stride, n, N)
    of_C = tl.dot(weights, inputs, of_C, input_precision=PRECISION)
    of_B = tl.dot(tl.trans(weights), read, of_B, input_precision=PRECISION)
    at = row[:, None] * (H // share * N) + (group * N + n)[None, :]
    inside = there[:, None] & (n < N)[None, :]
    tl.store(grad_B + at, of_B, mask=inside)
    tl.store(grad_C + at, of_C, mask=inside)
