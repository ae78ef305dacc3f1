"""Attention within whole sequences, in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sparse_attention(
    query: Tensor,
    window_kv: Tensor | None,
    entries: Tensor | None,
    entry_mask: Tensor | None,
    sink: Tensor,
    window: int,
    reach: Tensor | None,
    scale: float,
    value_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Implement :func:`kernels.sparse_attention.sparse_attention`."""
    B, S, H, c = query.shape
    query = query * scale
    keys, logits = None, []
    if window_kv is not None:
        block = min(window, S)
        keys, window_logits = _window_logits(query, window_kv, window, block, reach)
        logits.append(window_logits)
    if entries is not None and entry_mask is not None and entries.shape[-2]:
        if entries.dim() == 3:
            entry_logits = torch.bmm(query.reshape(B, S * H, c), entries.transpose(1, 2)).view(B, S, H, -1)
        else:
            entry_logits = query @ entries.transpose(-1, -2)
        logits.append(entry_logits.masked_fill(~entry_mask.unsqueeze(2), float("-inf")))
    logits.append(sink.view(1, 1, H, 1).expand(B, S, H, 1).to(query.dtype))
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = torch.cat(logits, dim=-1).softmax(dim=-1, dtype=wide)  # also under autocast

    n_window = 0
    out = query.new_zeros(B, S, H, value_size)
    if keys is not None:
        n_window, blocks = window_logits.shape[-1], keys.shape[1]
        window_weights = _pad_queries(weights[..., :n_window].to(keys.dtype), blocks * block)
        out = window_weights.reshape(B, blocks, block * H, n_window) @ keys[..., :value_size]
        out = out.reshape(B, blocks * block, H, value_size)[:, :S]
    entry_weights = weights[..., n_window:-1]
    if not entry_weights.shape[-1]:
        return out, None
    assert entries is not None
    values = entries[..., :value_size]
    if values.dim() == 3:
        out = out + torch.bmm(entry_weights.reshape(B, S * H, -1).to(values.dtype), values).view_as(out)
    else:
        out = out + entry_weights.to(values.dtype) @ values
    return out, entry_weights.detach().sum(dim=2)


def _window_logits(
    query: Tensor, window_kv: Tensor, window: int, block: int, reach: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the keys of every block of queries and the logits of the window.

    Keys are [B, blocks, block + window - 1, c], logits [B, S, H, block + window - 1].
    """
    B, S, H, c = query.shape
    past = window_kv.shape[1] - S
    blocks = -(-S // block)
    span = block + window - 1
    # The keys of a block start window - 1 tokens before its first query.
    padded = F.pad(window_kv, (0, 0, window - 1 - past, blocks * block - S))
    keys = padded.unfold(1, span, block).transpose(2, 3)
    folded = _pad_queries(query, blocks * block).reshape(B, blocks, block * H, c)
    logits = (folded @ keys.transpose(2, 3)).view(B, blocks, block, H, span)
    row = torch.arange(block, device=query.device).unsqueeze(1)
    column = torch.arange(span, device=query.device)
    band = (column >= row) & (column < row + window)  # [block, span]
    first = torch.arange(blocks, device=query.device).view(-1, 1, 1) * block
    exists = first + column >= window - 1 - past  # the rest is padding before the sequence
    sees = (band & exists).unsqueeze(0)  # [1, blocks, block, span]
    if reach is not None:
        oldest = row + window - F.pad(reach, (0, blocks * block - S), value=1).view(B, blocks, block, 1)
        sees = sees & (column >= oldest)
    logits = logits.masked_fill(~sees.unsqueeze(3), float("-inf"))
    return keys, logits.view(B, blocks * block, H, span)[:, :S]


def _pad_queries(x: Tensor, length: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, length - x.shape[1])) if x.shape[1] < length else x
