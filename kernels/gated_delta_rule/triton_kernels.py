"""Triton kernels of the gated delta rule. See :mod:`kernels.gated_delta_rule.triton` and the formulas in
:mod:`kernels.gated_delta_rule.eager`, where the products of a chunk are T = (I + A)^-1 and M = ``weights``.

A chunk has ``L`` tokens. Rows are tokens of the batch: row b * S + t. ``states`` and ``grad_states`` are [batch,
chunks + 1, H, K, V]: the states before every chunk and after the last one, and their gradients. Offsets that grow with
tokens are int64. Decays stay logarithms, and only sums of them are formed, never differences: logarithms of the first
token of a document are -inf.
"""

import triton
import triton.language as tl


@triton.jit
def _tokens(b, chunk, S, L: tl.constexpr):
    """Return rows of a chunk's tokens, and which of them exist."""
    t = chunk * L + tl.arange(0, L)
    return b * S + t.to(tl.int64), t < S


@triton.jit
def _tile(base, row, there, stride, column, width):
    """Load columns of rows, [rows, columns]; zeros where there are none."""
    inside = there[:, None] & (column < width)[None, :]
    return tl.load(base + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _log_decays(g, positions, row, there, stride, k, K, HAS_POSITIONS: tl.constexpr):
    """Return the logarithms of the decays of tokens, [tokens, K]: 0 for tokens that do not exist."""
    logs = _tile(g, row, there, stride, k, K)
    if HAS_POSITIONS:
        starts = tl.load(positions + row, mask=there, other=1) == 0
        logs = tl.where(starts[:, None], float("-inf"), logs)
    return logs


@triton.jit
def _until_end(g, positions, row, there, stride, k, K, HAS_POSITIONS: tl.constexpr, L: tl.constexpr):
    """Return the decays from each token to the chunk's end, its own excluded, [L, K]."""
    i = tl.arange(0, L)
    follows = (tl.sum(there.to(tl.int32), axis=0) > i + 1) & (i + 1 < L)
    logs = _log_decays(g, positions, row + 1, follows, stride, k, K, HAS_POSITIONS)
    return tl.exp(tl.cumsum(logs, axis=0, reverse=True))


@triton.jit
def _state(b, place, h, k, v, S, H, K, V, L: tl.constexpr):
    """Return the offsets of part of a state [K, V], and which of them exist."""
    first = ((b * (tl.cdiv(S, L) + 1) + place) * H + h) * K * V
    return first + k[:, None] * V + v[None, :], (k < K)[:, None] & (v < V)[None, :]


@triton.jit
def _square(b, chunk, h, S, H, L: tl.constexpr):
    """Return the offsets of a chunk's products [L, L]."""
    i = tl.arange(0, L)
    return ((b * tl.cdiv(S, L) + chunk) * H + h) * L * L + i[:, None] * L + i[None, :]


@triton.jit
def _merge(since, until, size, L: tl.constexpr):
    """Prepare the merge of pairs of blocks of ``size`` tokens.

    ``since`` [L, K] are logarithms of the decays from a block's begin to its tokens, own decays included, ``until``
    those from its tokens to its end, own decays excluded. Return the decays from the middle of a pair to tokens of
    second blocks, those from tokens of first blocks to the middle, 0 for all others, and ``since`` and ``until`` of the
    pairs.
    """
    i = tl.arange(0, L)
    second = (i // size % 2 == 1)[:, None]
    into = tl.where(second, tl.exp(since), 0.0)
    out_of = tl.where(second, 0.0, tl.exp(until))
    middle = (i // (2 * size) * (2 * size) + size - 1)[:, None] + tl.zeros(since.shape, tl.int32)
    first_total = tl.gather(since, middle, axis=0)
    second_total = tl.gather(since, middle + size, axis=0)
    return into, out_of, tl.where(second, since + first_total, since), tl.where(second, until, until + second_total)


@triton.jit
def _merged(x, size, L: tl.constexpr):
    """Return x [L, L] where row and column are in the second and first block of the same pair, 0 elsewhere."""
    i = tl.arange(0, L)
    block = i // size
    return tl.where((block[:, None] % 2 == 1) & (block[:, None] == block[None, :] + 1), x, 0.0)


@triton.jit
def products(
    q, k, g, beta, positions, inverse, weights,
    S, H, K, q_stride, k_stride, g_stride,
    HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write T and M of one chunk and head, [L, L]. Program ids: chunk, head, sequence."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row, there = _tokens(b, chunk, S, L)
    step = tl.load(beta + row * H + h, mask=there, other=0.0)
    i = tl.arange(0, L)
    own = i[:, None] == i[None, :]
    A = tl.zeros([L, L], tl.float32)
    M = tl.zeros([L, L], tl.float32)
    for begin in range(0, K, BLOCK_K):
        d = begin + tl.arange(0, BLOCK_K)
        query = _tile(q + h * K, row, there, q_stride, d, K)
        key = _tile(k + h * K, row, there, k_stride, d, K)
        since = _log_decays(g + h * K, positions, row, there, g_stride, d, K, HAS_POSITIONS)
        until = tl.zeros([L, BLOCK_K], tl.float32)
        M += tl.where(own, tl.sum(query * key, axis=1)[:, None], 0.0)
        for level in range(0, LEVELS):
            size = 1 << level
            into, out_of, since, until = _merge(since, until, size, L)
            columns = tl.trans(key * out_of)
            A += _merged(tl.dot(key * step[:, None] * into, columns, input_precision=PRECISION), size, L)
            M += _merged(tl.dot(query * into, columns, input_precision=PRECISION), size, L)
    T = tl.where(own, 1.0, 0.0)
    for level in range(0, LEVELS):
        between = tl.dot(_merged(A, 1 << level, L), T, input_precision=PRECISION)
        T -= tl.dot(T, between, input_precision=PRECISION)
    at = _square(b, chunk, h, S, H, L)
    tl.store(inverse + at, T)
    tl.store(weights + at, M)


@triton.jit
def carry(
    q, k, v, g, beta, positions, start, inverse, weights, out, last, states, changes,
    S, H, K, V, q_stride, k_stride, v_stride, g_stride,
    KEEP: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr, K_PAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Carry part of a head's state through all chunks, from ``start`` [batch, H, K, V].

    Write the outputs and the last state; with ``KEEP`` instead all states and the changes u of every token. Program
    ids: part of the values, head, sequence.
    """
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, K_PAD)
    c = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (d < K)[:, None] & (c < V)[None, :]
    part = (b * H + h) * K * V + d[:, None] * V + c[None, :]
    state = tl.load(start + part, mask=inside, other=0.0)
    chunks = tl.cdiv(S, L)
    for chunk in range(0, chunks):
        row, there = _tokens(b, chunk, S, L)
        logs = _log_decays(g + h * K, positions, row, there, g_stride, d, K, HAS_POSITIONS)
        since = tl.exp(tl.cumsum(logs, axis=0))
        key = _tile(k + h * K, row, there, k_stride, d, K)
        step = tl.load(beta + row * H + h, mask=there, other=0.0)
        error = _tile(v + h * V, row, there, v_stride, c, V)
        error -= tl.dot(key * since, state, input_precision=PRECISION)
        square = _square(b, chunk, h, S, H, L)
        change = tl.dot(tl.load(inverse + square), error * step[:, None], input_precision=PRECISION)
        at = (row * H + h)[:, None] * V + c[None, :]
        exists = there[:, None] & (c < V)[None, :]
        if KEEP:
            place, inside = _state(b, chunk, h, d, c, S, H, K, V, L)
            tl.store(states + place, state, mask=inside)
            tl.store(changes + at, change, mask=exists)
        else:
            query = _tile(q + h * K, row, there, q_stride, d, K)
            read = tl.dot(query * since, state, input_precision=PRECISION)
            read = tl.dot(tl.load(weights + square), change, read, input_precision=PRECISION)
            tl.store(out + at, read, mask=exists)
        key *= _until_end(g + h * K, positions, row, there, g_stride, d, K, HAS_POSITIONS, L)
        kept = tl.exp(tl.sum(logs, axis=0))
        state = tl.dot(tl.trans(key), change, state * kept[:, None], input_precision=PRECISION)
    if KEEP:
        place, inside = _state(b, chunks, h, d, c, S, H, K, V, L)
        tl.store(states + place, state, mask=inside)
    else:
        tl.store(last + part, state, mask=inside)


@triton.jit
def carry_gradients(
    q, k, g, beta, positions, grad_last, inverse, weights, grad_out, grad_states, grad_errors,
    S, H, K, V, q_stride, k_stride, g_stride,
    HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr, K_PAD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Carry part of the gradient of a head's state through all chunks, from the last to the first.

    Write the gradients of all states and those of the right sides beta * (v - ...) of the triangular systems. Program
    ids: part of the values, head, sequence.
    """
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, K_PAD)
    c = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (d < K)[:, None] & (c < V)[None, :]
    grad = tl.load(grad_last + (b * H + h) * K * V + d[:, None] * V + c[None, :], mask=inside, other=0.0)
    chunks = tl.cdiv(S, L)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        place, inside = _state(b, chunk + 1, h, d, c, S, H, K, V, L)
        tl.store(grad_states + place, grad, mask=inside)
        row, there = _tokens(b, chunk, S, L)
        logs = _log_decays(g + h * K, positions, row, there, g_stride, d, K, HAS_POSITIONS)
        since = tl.exp(tl.cumsum(logs, axis=0))
        key = _tile(k + h * K, row, there, k_stride, d, K)
        upstream = _tile(grad_out + h * V, row, there, H * V, c, V)
        square = _square(b, chunk, h, S, H, L)
        until = _until_end(g + h * K, positions, row, there, g_stride, d, K, HAS_POSITIONS, L)
        grad_change = tl.dot(key * until, grad, input_precision=PRECISION)
        grad_change = tl.dot(tl.trans(tl.load(weights + square)), upstream, grad_change, input_precision=PRECISION)
        grad_error = tl.dot(tl.trans(tl.load(inverse + square)), grad_change, input_precision=PRECISION)
        at = (row * H + h)[:, None] * V + c[None, :]
        tl.store(grad_errors + at, grad_error, mask=there[:, None] & (c < V)[None, :])
        kept = tl.exp(tl.sum(logs, axis=0))
        query = _tile(q + h * K, row, there, q_stride, d, K)
        grad = tl.dot(tl.trans(query * since), upstream, grad * kept[:, None], input_precision=PRECISION)
        step = tl.load(beta + row * H + h, mask=there, other=0.0)
        grad = tl.dot(tl.trans(key * since * -step[:, None]), grad_error, grad, input_precision=PRECISION)
    place, inside = _state(b, 0, h, d, c, S, H, K, V, L)
    tl.store(grad_states + place, grad, mask=inside)


@triton.jit
def token_gradients(
    q, k, v, g, beta, positions, states, changes, grad_states, grad_errors, grad_out,
    grad_q, grad_k, grad_v, grad_g, grad_beta,
    S, H, K, V, q_stride, k_stride, v_stride, g_stride,
    HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the gradients of all inputs of one chunk and head. Program ids: chunk, head, sequence.

    With G the sums of g from the chunk's begin, decays are exp(G[i] - G[j]). The gradient of G[i] is therefore query[i]
    times its gradient and beta[i] * key[i] times its, and that of G[j] is -key[j] times its; that of the chunk's end is
    the state after the chunk times its gradient.
    """
    chunk, h = tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row, there = _tokens(b, chunk, S, L)
    step = tl.load(beta + row * H + h, mask=there, other=0.0)
    grad_step = tl.zeros([L], tl.float32)
    of_A = tl.zeros([L, L], tl.float32)
    of_M = tl.zeros([L, L], tl.float32)
    for begin in range(0, V, BLOCK_V):
        c = begin + tl.arange(0, BLOCK_V)
        upstream = _tile(grad_out + h * V, row, there, H * V, c, V)
        grad_error = _tile(grad_errors + h * V, row, there, H * V, c, V)
        change = tl.trans(_tile(changes + h * V, row, there, H * V, c, V))
        of_M = tl.dot(upstream, change, of_M, input_precision=PRECISION)
        of_A = tl.dot(-grad_error, change, of_A, input_precision=PRECISION)
        grad_step += tl.sum(_tile(v + h * V, row, there, v_stride, c, V) * grad_error, axis=1)
        at = (row * H + h)[:, None] * V + c[None, :]
        tl.store(grad_v + at, grad_error * step[:, None], mask=there[:, None] & (c < V)[None, :])
    i = tl.arange(0, L)
    own = tl.sum(tl.where(i[:, None] == i[None, :], of_M, 0.0), axis=1)[:, None]  # a token reads itself without decay

    for first in range(0, K, BLOCK_K):
        d = first + tl.arange(0, BLOCK_K)
        grad_query = tl.zeros([L, BLOCK_K], tl.float32)
        grad_key = tl.zeros([L, BLOCK_K], tl.float32)
        grad_beta_key = tl.zeros([L, BLOCK_K], tl.float32)
        through_end = tl.zeros([BLOCK_K], tl.float32)
        for begin in range(0, V, BLOCK_V):
            c = begin + tl.arange(0, BLOCK_V)
            at, inside = _state(b, chunk, h, d, c, S, H, K, V, L)
            before = tl.trans(tl.load(states + at, mask=inside, other=0.0))
            upstream = _tile(grad_out + h * V, row, there, H * V, c, V)
            grad_query = tl.dot(upstream, before, grad_query, input_precision=PRECISION)
            grad_error = _tile(grad_errors + h * V, row, there, H * V, c, V)
            grad_beta_key = tl.dot(-grad_error, before, grad_beta_key, input_precision=PRECISION)
            at, inside = _state(b, chunk + 1, h, d, c, S, H, K, V, L)
            after = tl.load(grad_states + at, mask=inside, other=0.0)
            through_end += tl.sum(after * tl.load(states + at, mask=inside, other=0.0), axis=1)
            change = _tile(changes + h * V, row, there, H * V, c, V)
            grad_key = tl.dot(change, tl.trans(after), grad_key, input_precision=PRECISION)
        since = _log_decays(g + h * K, positions, row, there, g_stride, d, K, HAS_POSITIONS)
        begins = since == float("-inf")
        decay = tl.exp(tl.cumsum(since, axis=0))
        grad_query *= decay
        grad_beta_key *= decay
        grad_key *= _until_end(g + h * K, positions, row, there, g_stride, d, K, HAS_POSITIONS, L)
        query = _tile(q + h * K, row, there, q_stride, d, K)
        key = _tile(k + h * K, row, there, k_stride, d, K)
        until = tl.zeros([L, BLOCK_K], tl.float32)
        for level in range(0, LEVELS):
            size = 1 << level
            into, out_of, since, until = _merge(since, until, size, L)
            A = _merged(of_A, size, L)
            M = _merged(of_M, size, L)
            columns = key * out_of
            grad_beta_key += into * tl.dot(A, columns, input_precision=PRECISION)
            grad_query += into * tl.dot(M, columns, input_precision=PRECISION)
            back = tl.dot(tl.trans(A), key * step[:, None] * into, input_precision=PRECISION)
            back = tl.dot(tl.trans(M), query * into, back, input_precision=PRECISION)
            grad_key += out_of * back
        grad_logs = query * grad_query + key * (step[:, None] * grad_beta_key - grad_key)
        grad_logs = tl.cumsum(grad_logs, axis=0, reverse=True) + through_end[None, :]
        grad_step += tl.sum(key * grad_beta_key, axis=1)
        at = (row * H + h)[:, None] * K + d[None, :]
        inside = there[:, None] & (d < K)[None, :]
        tl.store(grad_g + at, tl.where(begins, 0.0, grad_logs), mask=inside)
        tl.store(grad_q + at, grad_query + own * key, mask=inside)
        tl.store(grad_k + at, grad_key + own * query + step[:, None] * grad_beta_key, mask=inside)
    tl.store(grad_beta + row * H + h, grad_step, mask=there)
