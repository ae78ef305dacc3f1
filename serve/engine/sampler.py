"""Token sampling for a batch of completions."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from kernels.sampling import sample
from serve.engine.sampling_params import SamplingParams


class Sampler:
    """Sampling state of one completion: its random numbers and the counts of its tokens."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], stop_ids: Iterable[int]):
        self.params = params
        self._random = random.Random(params.seed)
        self._draws: deque[float] = deque()
        self.generated = 0
        self.stop_ids = sorted(stop_ids)
        p = params
        self.counts_tokens = bool(p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty)
        self._uncounted_prompt = list(prompt) if p.repetition_penalty != 1 else []
        self._uncounted: list[int] = []
        """Generated tokens that ``_counts`` does not include yet."""
        self._counts: tuple[Tensor, Tensor] | None = None
        self._bias: tuple[Tensor, Tensor] | None = None

    @property
    def delays_end(self) -> bool:
        """True while ``min_tokens`` forbids stop tokens."""
        return bool(self.stop_ids) and self.generated < self.params.min_tokens

    @property
    def changes_logits(self) -> bool:
        return self.counts_tokens or bool(self.params.logit_bias) or self.delays_end

    def token_counts(self, vocab: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return which tokens occur in the prompt or the completion, bool [vocab], and how often each occurs in the
        completion, float32 [vocab]."""
        if self._counts is None:
            seen = torch.zeros(vocab, dtype=torch.bool, device=device)
            seen[self._uncounted_prompt] = True
            self._counts, self._uncounted_prompt = (seen, torch.zeros(vocab, device=device)), []
        seen, counts = self._counts
        for token in self._uncounted:
            seen[token] = True
            counts[token] += 1
        self._uncounted = []
        return seen, counts

    def bias(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the token IDs and the values of ``logit_bias``."""
        if self._bias is None:
            bias = self.params.logit_bias
            ids, values = torch.tensor(list(bias), device=device), torch.tensor(list(bias.values()), device=device)
            self._bias = ids, values.float()
        return self._bias

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
        if self.counts_tokens:
            self._uncounted.append(token)


def sample_tokens(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Sample the next token of every completion from logits [B, vocab], which are left unchanged.

    A completion's token depends on its own logits and random number only, not on the batch. It is -1, and not recorded,
    for a row with NaN or without a finite largest logit.
    """
    tokens = predict_tokens(logits, samplers)
    for sampler, token in zip(samplers, tokens):
        if token >= 0:
            sampler.count(token)
    return tokens


def predict_tokens(logits: Tensor, samplers: Sequence[Sampler], ahead: int = 0) -> list[int]:
    """Return the tokens that completions would sample from logits [B, vocab], ``ahead`` tokens after the next one.
    Samplers keep their state."""
    if any(sampler.changes_logits for sampler in samplers):
        logits = logits.clone(memory_format=torch.contiguous_format)
        change_logits(logits, samplers)
    params = [sampler.params for sampler in samplers]
    return sample(
        logits,
        [sampler.draw(ahead) if sampler.params.temperature > 0 else 0.0 for sampler in samplers],
        [p.temperature for p in params],
        [p.top_k for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
    )


def change_logits(logits: Tensor, samplers: Sequence[Sampler]) -> None:
    """Apply penalties, bias and ``min_tokens`` to contiguous logits [B, vocab], in place."""
    vocab, device = logits.shape[-1], logits.device
    if rows := [i for i, sampler in enumerate(samplers) if sampler.counts_tokens]:
        counted = [samplers[i].token_counts(vocab, device) for i in rows]
        logits[rows] = _penalize(logits[rows], [samplers[i].params for i in rows], counted)
    flat = logits.view(-1)
    if rows := [i for i, sampler in enumerate(samplers) if sampler.params.logit_bias]:
        biases = [samplers[i].bias(device) for i in rows]
        ids = torch.cat([ids + i * vocab for i, (ids, _) in zip(rows, biases)])
        flat[ids] += torch.cat([values for _, values in biases])
    if excluded := [i * vocab + token for i, s in enumerate(samplers) if s.delays_end for token in s.stop_ids]:
        flat[excluded] = float("-inf")


def _penalize(logits: Tensor, params: list[SamplingParams], counted: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return logits [R, vocab] after the repetition, presence and frequency penalties."""
    seen, counts = torch.stack([seen for seen, _ in counted]), torch.stack([counts for _, counts in counted])

    def column(value_of: Callable[[SamplingParams], float]) -> Tensor:
        return torch.tensor([[value_of(p)] for p in params], dtype=logits.dtype, device=logits.device)

    repetition = column(lambda p: p.repetition_penalty)
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    frequency, presence = column(lambda p: p.frequency_penalty), column(lambda p: p.presence_penalty)
    return logits - (frequency * counts + presence * (counts > 0))
