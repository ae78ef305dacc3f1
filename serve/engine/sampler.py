"""Token sampling and log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability, and the most likely alternatives."""

    token_id: int
    logprob: float | None
    """Natural logarithm; None for the first token of a prompt, which has no context."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely (token ID, logprob) pairs in descending order, followed by the token itself if it is not among
    them."""
    text_offset: int = 0
    """Characters of text before this token."""


def sample(logits: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator) -> int:
    """Sample a token ID from logits [vocab].

    ``temperature`` 0 returns the most likely token. Otherwise keep the ``top_k`` most likely tokens (0: all), then the
    smallest set of these whose probabilities at this temperature sum to at least ``top_p``, and sample from it with
    ``generator``, a CPU generator of this request alone.
    """
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.double().cpu()  # float32 would round a tiny temperature to 0
    # Subtract the maximum first: division by a tiny temperature must not overflow to inf - inf.
    scaled = (scaled - scaled.max()) / temperature
    probabilities, ids = scaled.softmax(dim=-1).sort(descending=True, stable=True)
    if top_k:
        probabilities = probabilities[:top_k]
    if top_p < 1:
        before = probabilities.cumsum(dim=0) - probabilities
        keep = before < top_p * probabilities.sum()
        keep[0] = True  # top_p = 0 keeps the most likely token
        probabilities = probabilities[keep]
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def token_logprobs(logits: Tensor, token_ids: list[int], top_n: int) -> list[TokenLogprob]:
    """Return the log-probabilities of n tokens under logits [n, vocab], with ``top_n`` alternatives each.

    The distribution is the model's own, before temperature and truncation. Text offsets are left at 0.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    ids = torch.tensor(token_ids, device=logits.device)
    token_values = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    top_values, top_ids = logprobs.topk(min(top_n, logprobs.shape[1]), dim=-1)
    records = []
    for token_id, logprob, row_ids, row in zip(token_ids, token_values, top_ids.tolist(), top_values.tolist()):
        top = tuple(zip(row_ids, row))
        if token_id not in row_ids:
            top += ((token_id, logprob),)
        records.append(TokenLogprob(token_id, logprob, top))
    return records
