"""The state-space scan in PyTorch, by matrix products within chunks of tokens (arXiv 2405.21060, section 6).

Within a chunk, token l reads token s <= l as attention would, with weight ``(C[l] . B[s]) * exp(sum of dt * A over
(s, l])``. Earlier chunks contribute through the state before the chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.autocast import in_float32

_MIN_LOG_DECAY = -104.0
"""exp of less is zero in float32. The bound limits the rounding of differences between cumulative sums."""
_MAX_WEIGHTS = 1 << 22
"""Limit on the weights between tokens computed at once. Longer inputs are computed in several pieces."""


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None = None,
    positions: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.ssd_scan.ssd_scan`."""
    batch, S, heads, _ = x.shape
    chunk = min(chunk_size, S)
    chunks = max(1, _MAX_WEIGHTS // (batch * heads * chunk * chunk))
    if state is None:
        state = x.new_zeros(batch, heads, x.shape[3], B.shape[3])
    # First token of each token's document, as an index in the row.
    first = None if positions is None else torch.arange(S, device=x.device) - positions
    outputs = []
    with in_float32(x):
        for begin in range(0, S, chunks * chunk):
            piece = slice(begin, begin + chunks * chunk)
            starts = None if first is None else first[:, piece] - begin
            y, state = _scan_chunks(x[:, piece], dt[:, piece], A, B[:, piece], C[:, piece], state, starts, chunk)
            outputs.append(y)
        y = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
        return torch.addcmul(y, x, D.unsqueeze(-1)), state


def _scan_chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, first: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Scan chunks of ``chunk`` tokens, without the skip connection. ``first`` int64 [batch, S]: index of the first
    token of each token's document, negative if it lies before these tokens."""
    batch, S, heads, P = x.shape
    groups, N = B.shape[2:]
    share = heads // groups
    missing = -S % chunk
    if missing:  # a step of size 0 changes nothing
        x, dt, B, C = (torch.cat((z, z.new_zeros(batch, missing, *z.shape[2:])), dim=1) for z in (x, dt, B, C))
        first = None if first is None else torch.cat((first, first[:, -1:].expand(-1, missing)), dim=1)
    n = (S + missing) // chunk
    x, dt, B, C = (z.unflatten(1, (n, chunk)) for z in (x, dt, B, C))

    # Logarithms of decays from the beginning of the chunk up to and including each token, [batch, n, L, H].
    logs = (dt * A).clamp(min=_MIN_LOG_DECAY).cumsum(2, dtype=torch.float64)
    since_begin, until_end = logs.exp().to(x.dtype), (logs[:, :, -1:] - logs).to(x.dtype).exp()
    kept = since_begin[:, :, -1]  # [batch, n, H]
    mask = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    if first is not None:
        places = torch.arange(chunk, device=x.device)
        relative = first.unflatten(1, (n, chunk)) - torch.arange(0, n * chunk, chunk, device=x.device).unsqueeze(-1)
        mask = (mask & (places >= relative.unsqueeze(-1))).unsqueeze(2)  # [batch, n, 1, L, L]
        continued = (relative < 0).unsqueeze(-1)  # the document began before the chunk
        since_begin = since_begin.masked_fill(~continued, 0.0)
        kept = kept.masked_fill(~continued[:, :, -1], 0.0)
        until_end = until_end.masked_fill((places < relative[:, :, -1:]).unsqueeze(-1), 0.0)

    # Within chunks: [batch, n, G, L, L] products shared by the heads of a group, times the heads' decays.
    stepped = x * dt.unsqueeze(-1)
    B, C = B.transpose(2, 3), C.transpose(2, 3)  # [batch, n, G, L, N]
    narrow = logs.to(x.dtype).transpose(2, 3)
    decays = (narrow.unsqueeze(-1) - narrow.unsqueeze(-2)).masked_fill(~mask, float("-inf")).exp()
    weights = (C @ B.transpose(3, 4)).unsqueeze(3) * decays.unflatten(2, (groups, share))
    y = (weights.flatten(2, 3) @ stepped.transpose(2, 3)).transpose(2, 3)  # [batch, n, L, H, P]

    # Between chunks: the contribution of each chunk to the state, then the states before the chunks.
    rows = (stepped * until_end.unsqueeze(-1)).unflatten(3, (groups, share)).permute(0, 1, 3, 4, 5, 2)
    added = (rows.flatten(3, 4) @ B).reshape(batch, n, heads, P, N)
    before = []
    # unbind: the backward pass of an index would add a tensor of all chunks for every chunk.
    for new, share_kept in zip(added.unbind(1), kept[..., None, None].unbind(1)):
        before.append(state)
        state = torch.addcmul(new, share_kept, state)
    states = torch.stack(before, dim=1).unflatten(2, (groups, share)).flatten(3, 4)  # [batch, n, G, share * P, N]
    carried = (C @ states.transpose(3, 4)).transpose(2, 3).reshape(batch, n, chunk, heads, P)
    y = torch.addcmul(y, carried, since_begin.unsqueeze(-1))
    return y.flatten(1, 2)[:, :S], state
