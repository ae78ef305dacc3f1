"""From logits to a token, and to the log-probabilities reported beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprob:
    """One token, and what the model thought of it."""

    token_id: int
    logprob: float | None
    """Natural logarithm; None for the first token of a prompt, which nothing predicts."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely (token id, logprob) in falling order, then the token itself where it is not among them."""
    offset: int = 0
    """Characters of text before this token."""


def sample(logits: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator) -> int:
    """Draw a token id from logits [vocab].

    ``temperature`` 0 takes the most likely token. Otherwise the ``top_k`` most likely tokens (0: all) are kept, of
    these the fewest whose probabilities at this temperature sum to at least ``top_p``, and one is drawn with
    ``generator`` (a CPU generator), which no other request shares.
    """
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.double().cpu()  # in float32 a tiny temperature would be 0
    # The largest logit becomes 0 first: dividing by a tiny temperature must not overflow to inf - inf.
    scaled = (scaled - scaled.max()) / temperature
    probabilities, ids = scaled.softmax(dim=-1).sort(descending=True, stable=True)
    if top_k:
        probabilities = probabilities[:top_k]
    if top_p < 1:
        before = probabilities.cumsum(dim=0) - probabilities
        keep = before < top_p * probabilities.sum()
        keep[0] = True  # top_p = 0 means the most likely token, not none
        probabilities = probabilities[keep]
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def token_logprobs(logits: Tensor, token_ids: list[int], top_n: int) -> list[TokenLogprob]:
    """What rows of logits [n, vocab] say of the n tokens that followed them, with the ``top_n`` alternatives.

    The values are of the model's own distribution, before temperature and truncation. Offsets are left at 0.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    ids = torch.tensor(token_ids, device=logits.device)
    chosen = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    best, best_ids = logprobs.topk(min(top_n, logprobs.shape[1]), dim=-1)
    records = []
    for token_id, logprob, row_ids, row in zip(token_ids, chosen, best_ids.tolist(), best.tolist()):
        top = tuple(zip(row_ids, row))
        if token_id not in row_ids:
            top += ((token_id, logprob),)
        records.append(TokenLogprob(token_id, logprob, top))
    return records
