"""Triton kernels of hyper-connections. See :mod:`kernels.hyper_connections.triton`.

Tokens are T = B * S, streams N, a power of two. Logits of a token are, in order: N of pre, N of post, N * N of comb.
"""

import triton
import triton.language as tl


@triton.jit
def project(
    streams, fn, raw, inverse_rms,
    T, K, norm_eps,
    M: tl.constexpr, M_PAD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the products of the normalized streams [T, K] with ``fn`` [M, K], and the factors of the norm [T]."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    m = tl.arange(0, M_PAD)
    acc = tl.zeros([BLOCK_T, M_PAD], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        x = tl.load(streams + t[:, None] * K + k[None, :], mask=(t < T)[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(fn + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        squares += tl.sum(x * x, axis=1)
    factor = 1.0 / tl.sqrt(squares / K + norm_eps)
    tl.store(raw + t[:, None] * M + m[None, :], acc * factor[:, None], mask=(t < T)[:, None] & (m < M)[None, :])
    tl.store(inverse_rms + t, factor, mask=t < T)


@triton.jit
def _comb_softmax(raw, scale, base, t, there, M: tl.constexpr, N: tl.constexpr):
    """Return the softmax over targets of the logits of comb: [T, N, N], sources before targets."""
    i = tl.arange(0, N)
    at = 2 * N + i[:, None] * N + i[None, :]
    z = tl.load(raw + t[:, None, None] * M + at[None, :, :], mask=there[:, None, None], other=0.0)
    z = z * tl.load(scale + 2) + tl.load(base + at)[None, :, :]
    z = tl.exp(z - tl.max(z, axis=2)[:, :, None])
    return z / tl.sum(z, axis=2)[:, :, None]


@triton.jit
def mix(
    streams, raw, scale, base, norm_weight, x, post, comb,
    T, D, eps, norm_eps, iterations,
    M: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write post, comb and the normalized weighted sums of the streams.

    The weights are computed for BLOCK_T tokens together. The sums follow token by token: BLOCK_D is at least D, so that
    a sum stays in registers until its norm is known.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = first + tl.arange(0, BLOCK_T)
    there = t < T
    i = tl.arange(0, N)
    z = tl.load(raw + t[:, None] * M + N + i[None, :], mask=there[:, None], other=0.0) * tl.load(scale + 1)
    weights = 2.0 / (1.0 + tl.exp(-(z + tl.load(base + N + i)[None, :])))
    tl.store(post + t[:, None] * N + i[None, :], weights, mask=there[:, None])
    matrix = _comb_softmax(raw, scale, base, t, there, M, N) + eps
    matrix = matrix / (tl.sum(matrix, axis=1)[:, None, :] + eps)
    for _ in range(1, iterations):
        matrix = matrix / (tl.sum(matrix, axis=2)[:, :, None] + eps)
        matrix = matrix / (tl.sum(matrix, axis=1)[:, None, :] + eps)
    at = t[:, None, None] * (N * N) + (i[:, None] * N + i[None, :])[None, :, :]
    tl.store(comb + at, matrix, mask=there[:, None, None])
    d = tl.arange(0, BLOCK_D)
    gain = tl.load(norm_weight + d, mask=d < D, other=0.0)
    for token in range(first, tl.minimum(first + BLOCK_T, T)):
        acc = tl.zeros([BLOCK_D], tl.float32)
        for j in tl.static_range(N):
            pre = _pre(raw, scale, base, token, True, j, M) + eps
            acc += pre * tl.load(streams + (token * N + j) * D + d, mask=d < D, other=0.0)
        factor = 1.0 / tl.sqrt(tl.sum(acc * acc, axis=0) / D + norm_eps)
        tl.store(x + token * D + d, acc * factor * gain, mask=d < D)


@triton.jit
def _pre(raw, scale, base, t, there, j, M: tl.constexpr):
    """Return the weights of stream j in the inputs of the block before the norm, without eps, in the shape of t."""
    z = tl.load(raw + t * M + j, mask=there, other=0.0) * tl.load(scale) + tl.load(base + j)
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def expand(
    streams, comb, post, output, out,
    T, D,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the streams after a block. Program ids: tokens, dims."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    there = t < T
    inside = there[:, None] & (d < D)[None, :]
    f = tl.load(output + t[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(N):
        acc = tl.load(post + t * N + k, mask=there, other=0.0)[:, None] * f
        for j in tl.static_range(N):
            weight = tl.load(comb + (t * N + j) * N + k, mask=there, other=0.0)
            acc += weight[:, None] * tl.load(streams + (t[:, None] * N + j) * D + d[None, :], mask=inside, other=0.0)
        tl.store(out + (t[:, None] * N + k) * D + d[None, :], acc, mask=inside)


@triton.jit
def expand_backward(
    grad, streams, comb, post, output, grad_streams, grad_comb, grad_post, grad_output,
    D,
    N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the inputs of :func:`expand` for one token."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    weights = tl.load(comb + t * (N * N) + i[:, None] * N + i[None, :])
    own = tl.load(post + t * N + i)
    sums = tl.zeros([N, N, BLOCK_D], tl.float32)
    own_sums = tl.zeros([N, BLOCK_D], tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        at = (t * N + i)[:, None] * D + d[None, :]
        inside = (d < D)[None, :] & (i >= 0)[:, None]
        g = tl.load(grad + at, mask=inside, other=0.0)
        x = tl.load(streams + at, mask=inside, other=0.0)
        f = tl.load(output + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(grad_streams + at, tl.sum(weights[:, :, None] * g[None, :, :], axis=1), mask=inside)
        narrow = tl.sum(own[:, None] * g, axis=0)
        tl.store(grad_output + t * D + d, narrow, mask=d < D)
        sums += x[:, None, :] * g[None, :, :]
        own_sums += g * f[None, :]
    tl.store(grad_comb + t * (N * N) + i[:, None] * N + i[None, :], tl.sum(sums, axis=2))
    tl.store(grad_post + t * N + i, tl.sum(own_sums, axis=1))


@triton.jit
def mix_backward(
    streams, raw, scale, base, norm_weight, grad_x, grad_post, grad_comb, divisors, grad_logits, norm_factors,
    D, eps, norm_eps, iterations,
    M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one token's logits [M] and two factors of the norm's backward pass.

    With y the weighted sum of the streams, r its inverse RMS and g the gradient of the block's input times the norm's
    weight, the gradient of y is ``r * g - r^3 * mean(g * y) * y``. The factors are r and r^3 * mean(g * y).

    The Sinkhorn iterations run again and store their divisors [2 * iterations - 1, N]. On the way back, the matrix
    before a division is the product of the one after it with the divisors.
    """
    token = tl.program_id(0).to(tl.int64)
    t = token + tl.zeros([1], tl.int64)
    i = tl.arange(0, N)
    z = tl.load(raw + token * M + i) * tl.load(scale) + tl.load(base + i)
    gate = 1.0 / (1.0 + tl.exp(-z))
    pre = gate + eps
    with_grad = tl.zeros([N, BLOCK_D], tl.float32)  # products of the streams with g
    with_mixed = tl.zeros([N, BLOCK_D], tl.float32)  # and with y
    along = tl.zeros([BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        at = (token * N + i)[:, None] * D + d[None, :]
        x = tl.load(streams + at, mask=(d < D)[None, :] & (i >= 0)[:, None], other=0.0)
        g = tl.load(grad_x + token * D + d, mask=d < D, other=0.0) * tl.load(norm_weight + d, mask=d < D, other=0.0)
        mixed = tl.sum(pre[:, None] * x, axis=0)
        with_grad += x * g[None, :]
        with_mixed += x * mixed[None, :]
        along += g * mixed
        squares += mixed * mixed
    factor = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / D + norm_eps)
    back = factor * factor * factor * tl.sum(along, axis=0) / D
    tl.store(norm_factors + token * 2, factor)
    tl.store(norm_factors + token * 2 + 1, back)
    grad_pre = factor * tl.sum(with_grad, axis=1) - back * tl.sum(with_mixed, axis=1)
    tl.store(grad_logits + token * M + i, grad_pre * gate * (1.0 - gate))
    z = tl.load(raw + token * M + N + i) * tl.load(scale + 1) + tl.load(base + N + i)
    gate = 1.0 / (1.0 + tl.exp(-z))
    upstream = tl.load(grad_post + token * N + i)
    tl.store(grad_logits + token * M + N + i, upstream * 2.0 * gate * (1.0 - gate))

    soft = tl.reshape(_comb_softmax(raw, scale, base, t, t >= 0, M, N), [N, N])
    own = divisors + token * (2 * iterations - 1) * N
    matrix = soft + eps
    for half in range(0, 2 * iterations - 1):
        columns = tl.sum(matrix, axis=0) + eps
        rows = tl.sum(matrix, axis=1) + eps
        if half % 2 == 0:
            tl.store(own + half * N + i, columns)
            matrix = matrix / columns[None, :]
        else:
            tl.store(own + half * N + i, rows)
            matrix = matrix / rows[:, None]
    tl.debug_barrier()  # other threads may have stored the divisors
    grad = tl.load(grad_comb + token * (N * N) + i[:, None] * N + i[None, :])
    for step in range(0, 2 * iterations - 1):
        half = 2 * iterations - 2 - step
        divisor = tl.load(own + half * N + i)
        if half % 2 == 0:
            grad = (grad - tl.sum(grad * matrix, axis=0)[None, :]) / divisor[None, :]
            matrix = matrix * divisor[None, :]
        else:
            grad = (grad - tl.sum(grad * matrix, axis=1)[:, None]) / divisor[:, None]
            matrix = matrix * divisor[:, None]
    grad = soft * (grad - tl.sum(grad * soft, axis=1)[:, None])
    tl.store(grad_logits + token * M + 2 * N + i[:, None] * N + i[None, :], grad)


@triton.jit
def streams_backward(
    later, grad_x, grad_products, through_norm, norm_factors, raw, scale, base, norm_weight, fn, streams,
    grad_streams, grad_weight_parts,
    T, D, eps,
    M: tl.constexpr, M_PAD: tl.constexpr, N: tl.constexpr, HAS_LATER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the streams: of their later uses, the weighted sum, the projection and the two norms.

    The gradient of the norm's weight is a sum over tokens. Each program writes that of its own: [programs, D].
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = tl.arange(0, M_PAD)
    there = t < T
    inside = there[:, None] & (d < D)[None, :]
    p = tl.load(grad_products + t[:, None] * M + m[None, :], mask=there[:, None] & (m < M)[None, :], other=0.0)
    factor = tl.load(through_norm + t, mask=there, other=0.0)
    mixed = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for j in tl.static_range(N):
        x = tl.load(streams + (t[:, None] * N + j) * D + d[None, :], mask=inside, other=0.0)
        mixed += (_pre(raw, scale, base, t, there, j, M) + eps)[:, None] * x
    inverse = tl.load(norm_factors + t * 2, mask=there, other=0.0)
    back = tl.load(norm_factors + t * 2 + 1, mask=there, other=0.0)
    g = inverse[:, None] * tl.load(grad_x + t[:, None] * D + d[None, :], mask=inside, other=0.0)
    tl.store(grad_weight_parts + tl.program_id(0).to(tl.int64) * D + d, tl.sum(g * mixed, axis=0), mask=d < D)
    g = g * tl.load(norm_weight + d, mask=d < D, other=0.0)[None, :] - back[:, None] * mixed
    for j in tl.static_range(N):
        w = tl.load(fn + (m[:, None] * N + j) * D + d[None, :], mask=(m < M)[:, None] & (d < D)[None, :], other=0.0)
        at = (t[:, None] * N + j) * D + d[None, :]
        x = tl.load(streams + at, mask=inside, other=0.0)
        pre = _pre(raw, scale, base, t, there, j, M) + eps
        acc = pre[:, None] * g + factor[:, None] * x
        if HAS_LATER:
            acc += tl.load(later + at, mask=inside, other=0.0)
        acc += tl.dot(p, w, input_precision=PRECISION)
        tl.store(grad_streams + at, acc, mask=inside)
