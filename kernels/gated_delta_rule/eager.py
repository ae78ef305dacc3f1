"""The gated delta rule in PyTorch, by matrix products within chunks of tokens.

Within a chunk, the changes u of the state solve a triangular system (the WY representation, arXiv 2510.26692, section
3.2), with the decay from token j to token i written as D(j, i)::

    (I + A) u = beta * (v - (k * D(begin, i)) @ state),   A[i, j] = beta[i] * sum(k[i] * k[j] * D(j, i)) for j < i
    out[i] = (q[i] * D(begin, i)) @ state + sum over j <= i of sum(q[i] * k[j] * D(j, i)) * u[j]

Earlier chunks contribute through the state before the chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.autocast import in_float32
from kernels.gated_delta_rule.decayed_products import decayed_products

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
    if positions is not None:
        g = g.masked_fill((positions == 0)[:, :, None, None], float("-inf"))
    if state is None:
        state = q.new_zeros(B, H, K, v.shape[3])
    tokens = max(1, _MAX_ELEMENTS // (B * H * chunk * K)) * chunk
    outputs = []
    with in_float32(q):
        for piece in zip(*(x.split(tokens, dim=1) for x in (q, k, v, g, beta))):
            out, state = _scan_chunks(piece, state, chunk)
            outputs.append(out)
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], state


def _scan_chunks(inputs: tuple[Tensor, ...], state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Scan chunks of ``chunk`` tokens. ``inputs`` are q, k, v, g and beta."""
    B, S, H, K = inputs[0].shape
    n = -(-S // chunk)
    missing = n * chunk - S

    def by_chunks(x: Tensor) -> Tensor:
        """[B, S, H, c] -> [n * B * H, chunk, c]. Tokens added at the end change nothing."""
        if missing:
            x = torch.cat((x, x.new_zeros(B, missing, *x.shape[2:])), dim=1)
        return x.unflatten(1, (n, chunk)).permute(1, 0, 3, 2, 4).reshape(n * B * H, chunk, x.shape[3])

    def each_chunk(x: Tensor) -> tuple[Tensor, ...]:
        """[n * B * H, ...] -> n times [B * H, ...]"""
        return x.unflatten(0, (n, B * H)).unbind()

    q, k, v, g = (by_chunks(x) for x in inputs[:4])
    beta = by_chunks(inputs[4].unsqueeze(-1))
    beta_key = k * beta
    products = decayed_products(q, beta_key, k, g)
    rows = torch.bmm(products.inverse, torch.cat((beta_key * products.since_begin, v * beta), dim=-1))
    by_state, own = map(each_chunk, rows.split((K, v.shape[2]), dim=-1))
    into_state = each_chunk((k * products.until_end).transpose(1, 2))
    kept = each_chunk(products.kept.unsqueeze(-1))

    state = state.flatten(0, 1)
    states, changes = [], []
    for i in range(n):
        states.append(state)
        changes.append(torch.baddbmm(own[i], by_state[i], state, alpha=-1))
        state = torch.baddbmm(kept[i] * state, into_state[i], changes[i])
    out = torch.bmm(products.weights, torch.cat(changes))
    out = torch.baddbmm(out, q * products.since_begin, torch.cat(states))
    out = out.view(n, B, H, chunk, -1).permute(1, 0, 3, 2, 4).reshape(B, n * chunk, H, -1)[:, :S]
    return out, state.unflatten(0, (B, H))
