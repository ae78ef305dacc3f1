"""The gated delta rule in PyTorch, by matrix products within chunks of tokens.

Within a chunk, the changes u of the state solve a triangular system (the WY representation, arXiv 2510.26692, section
3.2), with the products of decays written as D(j, i) = exp(sum of g over (j, i])::

    (I + A) u = beta * (v - (k * D(start, i)) @ state),   A[i, j] = beta[i] * sum(k[i] * k[j] * D(j, i)), j < i
    out[i] = (q[i] * D(start, i)) @ state + sum over j <= i of sum(q[i] * k[j] * D(j, i)) * u[j]

D(j, i) is never divided out of two cumulative products, which overflow or vanish for strong decays. Blocks of tokens
are merged in pairs instead, from single tokens up to the chunk: for j in the first half and i in the second,
D(j, i) is D(j, middle) * D(middle, i), whose factors are at most 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.autocast import in_float32

_MAX_ELEMENTS = 1 << 22
"""Limit on the elements of keys computed at once. Longer inputs are computed in several pieces."""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    positions: Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.gated_delta_rule.gated_delta_rule`."""
    B, S, H, K = q.shape
    chunk = min(chunk_size, 1 << (S - 1).bit_length())
    decay = g.exp()
    if positions is not None:
        decay = decay.masked_fill((positions == 0)[:, :, None, None], 0.0)
    if state is None:
        state = q.new_zeros(B, H, K, v.shape[3])
    tokens = max(1, _MAX_ELEMENTS // (B * H * chunk * K)) * chunk
    outputs = []
    with in_float32(q):
        for piece in zip(*(x.split(tokens, dim=1) for x in (q, k, v, decay, beta))):
            out, state = _scan_chunks(piece, state, chunk)
            outputs.append(out)
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], state


def _scan_chunks(inputs: tuple[Tensor, ...], state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Scan chunks of ``chunk`` tokens. ``inputs`` are q, k, v, the decays [B, S, H, K] and beta."""
    q, k, v, decay, beta = inputs
    B, S, H, K = q.shape
    n = -(-S // chunk)
    missing = n * chunk - S

    def by_chunks(x: Tensor, filler: float = 0.0) -> Tensor:
        """[B, S, H, c] -> [n * B * H, chunk, c]"""
        if missing:
            x = torch.cat((x, x.new_full((B, missing, *x.shape[2:]), filler)), dim=1)
        return x.unflatten(1, (n, chunk)).permute(1, 0, 3, 2, 4).reshape(n * B * H, chunk, x.shape[3])

    q, k, v, beta = by_chunks(q), by_chunks(k), by_chunks(v), by_chunks(beta.unsqueeze(-1))
    key = k * beta
    products = _multiply_decayed(q, key, k, by_chunks(decay, 1.0))
    rows = products.inverse @ torch.cat((key * products.since_begin, v * beta), dim=-1)
    by_state, own = (x.unflatten(0, (n, B * H)) for x in rows.split((K, v.shape[2]), dim=-1))
    reading = (k * products.until_end).transpose(1, 2).unflatten(0, (n, B * H))
    kept = products.since_begin[:, -1:].transpose(1, 2).unflatten(0, (n, B * H))  # [n, B * H, K, 1]

    state = state.flatten(0, 1)
    states, changes = [], []
    for i in range(n):
        states.append(state)
        changes.append(torch.baddbmm(own[i], by_state[i], state, alpha=-1))
        state = torch.baddbmm(kept[i] * state, reading[i], changes[i])
    before = torch.cat(states)  # [n * B * H, K, V]
    out = torch.baddbmm(products.weights @ torch.cat(changes), q * products.since_begin, before)
    out = out.view(n, B, H, chunk, -1).permute(1, 0, 3, 2, 4).reshape(B, n * chunk, H, -1)[:, :S]
    return out, state.unflatten(0, (B, H))


class _Products(NamedTuple):
    """Products within chunks of L tokens."""

    inverse: Tensor
    """[N, L, L]: inverse of I + A."""
    weights: Tensor
    """[N, L, L]: sum(q[i] * k[j] * D(j, i)) for j <= i."""
    since_begin: Tensor
    """[N, L, K]: D(start, i), the decay of token i included."""
    until_end: Tensor
    """[N, L, K]: D(j, end), the decay of token j excluded."""


def _multiply_decayed(query: Tensor, key: Tensor, k: Tensor, decay: Tensor) -> _Products:
    """Merge blocks from one token up to the chunk. All inputs are [N, L, K]; ``key`` is ``k`` times beta."""
    N, L, K = k.shape
    inverse = k.new_ones(N * L, 1, 1)
    weights = (query * k).sum(-1).view(N * L, 1, 1)
    since, until = decay, torch.ones_like(decay)
    size = 1
    while size < L:

        def halves(x: Tensor, size: int = size) -> tuple[Tensor, ...]:
            return x.view(-1, 2, size, x.shape[-1]).unbind(1)

        since_1, since_2 = halves(since)
        until_1, until_2 = halves(until)
        columns = (halves(k)[0] * until_1).transpose(1, 2)
        between = torch.bmm(halves(key)[1] * since_2, columns)
        inverse_1, inverse_2 = halves(inverse)
        inverse = _merge(inverse_1, -(inverse_2 @ between @ inverse_1), inverse_2)
        weights_1, weights_2 = halves(weights)
        weights = _merge(weights_1, torch.bmm(halves(query)[1] * since_2, columns), weights_2)
        since = torch.stack((since_1, since_2 * since_1[:, -1:]), dim=1)
        until = torch.stack((until_1 * since_2[:, -1:], until_2), dim=1)
        size *= 2
    return _Products(inverse.view(N, L, L), weights.view(N, L, L), since.view(N, L, K), until.view(N, L, K))


def _merge(first: Tensor, between: Tensor, second: Tensor) -> Tensor:
    """Return the block matrices [[first, 0], [between, second]], [N, 2 * size, 2 * size]."""
    above = torch.cat((first, torch.zeros_like(first)), dim=2)
    return torch.cat((above, torch.cat((between, second), dim=2)), dim=1)
