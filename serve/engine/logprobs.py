"""Log-probabilities of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLogprob(NamedTuple):
    """A token, its log-probability, and the most likely alternatives."""

    token_id: int
    logprob: float | None
    """Natural logarithm; None for the first token of a prompt, which has no context."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely (token ID, logprob) pairs in descending order, followed by the token itself if it is not among
    them."""
    text_offset: int = 0
    """Characters of text before this token."""


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], top_ns: Sequence[int], vocab_size: int | None = None
) -> list[TokenLogprob]:
    """Return the log-probabilities of n tokens under logits [n, vocab], with ``top_ns[i]`` alternatives each.

    The distribution is the model's own, before penalties, temperature and truncation. Alternatives have IDs below
    ``vocab_size``. Text offsets are left at 0.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    ids = torch.tensor(token_ids, device=logits.device)
    token_values = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    offered = logprobs[:, :vocab_size]
    most = min(max(top_ns, default=0), offered.shape[1])
    if not most:
        return [TokenLogprob(token_id, value, ((token_id, value),)) for token_id, value in zip(token_ids, token_values)]
    top_values, top_ids = offered.topk(most, dim=-1)
    records = []
    for token_id, logprob, row_ids, row, n in zip(
        token_ids, token_values, top_ids.tolist(), top_values.tolist(), top_ns
    ):
        top = tuple(zip(row_ids[:n], row[:n]))
        if token_id not in row_ids[:n]:
            top += ((token_id, logprob),)
        records.append(TokenLogprob(token_id, logprob, top))
    return records
