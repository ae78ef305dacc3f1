"""Token sampling for a batch of completions."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from serve.engine.sampling_params import SamplingParams


class Sampler:
    """Sampling state of one completion: its random numbers and the counts of its tokens."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], stop_ids: Iterable[int]):
        self.params = params
        self._random = random.Random(params.seed)
        self._draws: deque[float] = deque()
        self.generated = 0
        self._stop_ids = sorted(stop_ids)
        self._prompt = set(prompt) if params.repetition_penalty != 1 else set()
        self._counts: Counter[int] = Counter()
        p = params
        self._counts_tokens = bool(p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty)

    @property
    def changes_logits(self) -> bool:
        return self._counts_tokens or bool(self.params.logit_bias) or self.generated < self.params.min_tokens

    def change_logits(self, logits: Tensor) -> None:
        """Apply penalties, bias and ``min_tokens`` to logits [vocab], in place."""
        p, device = self.params, logits.device
        if p.repetition_penalty != 1 and (seen := sorted(self._prompt | self._counts.keys())):
            ids = torch.tensor(seen, device=device)
            chosen = logits[ids]
            logits[ids] = torch.where(chosen > 0, chosen / p.repetition_penalty, chosen * p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and self._counts:
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype, device=device)
            ids = torch.tensor(list(self._counts), device=device)
            logits[ids] -= p.presence_penalty + p.frequency_penalty * counts
        if p.logit_bias:
            ids = torch.tensor(list(p.logit_bias), device=device)
            logits[ids] += torch.tensor(list(p.logit_bias.values()), dtype=logits.dtype, device=device)
        if self.generated < p.min_tokens:
            logits[self._stop_ids] = float("-inf")

    def draw(self, ahead: int = 0) -> float:
        """Return the uniform random number of the next token, or of the one ``ahead`` tokens later."""
        while len(self._draws) <= ahead:
            self._draws.append(self._random.random())
        return self._draws[ahead]

    def count(self, token: int) -> None:
        """Record a sampled token."""
        self.generated += 1
        if self._draws:
            self._draws.popleft()
        if self._counts_tokens:
            self._counts[token] += 1


def sample_tokens(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Sample the next token of every completion from logits [B, vocab], which are left unchanged.

    A completion's token depends on its own logits and random number only, not on the batch.
    """
    tokens = predict_tokens(logits, samplers)
    for sampler, token in zip(samplers, tokens):
        sampler.count(token)
    return tokens


def predict_tokens(logits: Tensor, samplers: Sequence[Sampler], ahead: int = 0) -> list[int]:
    """Return the tokens that completions would sample from logits [B, vocab], ``ahead`` tokens after the next one.
    Samplers keep their state."""
    changed = [i for i, sampler in enumerate(samplers) if sampler.changes_logits]
    if changed:
        logits = logits.clone()
        for i in changed:
            samplers[i].change_logits(logits[i])
    tokens = logits.argmax(dim=-1).tolist()
    for truncates in (False, True):
        rows = [
            i for i, s in enumerate(samplers) if s.params.temperature > 0 and _truncates(s.params, logits) == truncates
        ]
        if rows:
            drawn = _draw(logits[rows], [samplers[i] for i in rows], truncates, ahead)
            for i, token in zip(rows, drawn):
                tokens[i] = token
    return tokens


def _truncates(params: SamplingParams, logits: Tensor) -> bool:
    return params.top_p < 1 or params.min_p > 0 or 0 < params.top_k < logits.shape[-1]


def _draw(logits: Tensor, samplers: list[Sampler], truncates: bool, ahead: int) -> list[int]:
    """Draw one token per row of logits [B, vocab] by inverting the cumulative distribution."""
    params = [sampler.params for sampler in samplers]
    device = logits.device
    # A tiny temperature would be 0 in float32. Subtracting the maximum first keeps the quotient finite.
    scaled = logits.double()
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float64, device=device)
    probabilities = ((scaled - scaled.amax(-1, keepdim=True)) / temperature.unsqueeze(-1)).softmax(-1)
    ids = None
    if truncates:
        probabilities, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        probabilities = _truncate(probabilities, params)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    uniform = torch.tensor([[s.draw(ahead)] for s in samplers], dtype=torch.float64, device=device)
    # Below the total, so that the token found has a positive probability.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, target, right=True)
    return (found if ids is None else ids.gather(1, found))[:, 0].tolist()


def _truncate(probabilities: Tensor, params: list[SamplingParams]) -> Tensor:
    """Zero the probabilities [B, vocab], in descending order, of tokens outside top_k, then top_p, then min_p. The most
    likely token is always kept."""
    vocab, device = probabilities.shape[-1], probabilities.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(-1)

    rank = torch.arange(vocab, device=device)
    probabilities = probabilities.masked_fill(rank >= column([p.top_k or vocab for p in params]), 0.0)
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = column([p.top_p for p in params])
    keep = (before < top_p * probabilities.sum(-1, keepdim=True)) | (top_p >= 1)
    keep &= probabilities >= column([p.min_p for p in params]) * probabilities[:, :1]
    keep[:, 0] = True
    return probabilities.masked_fill(~keep, 0.0)
