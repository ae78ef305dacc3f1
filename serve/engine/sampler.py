"""Token sampling for a batch of completions."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.sampling import sample
from serve.engine.sampling_params import SamplingParams


class TokenCounts:
    """Distinct tokens of a prompt and a completion, and how often each occurs in the completion."""

    def __init__(self, prompt: Iterable[int]):
        self._index = {token: index for index, token in enumerate(dict.fromkeys(prompt))}
        self._ids = np.array([*self._index], dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)

    def add(self, token: int) -> None:
        """Count a token of the completion."""
        index = self._index.setdefault(token, len(self._index))
        if index == len(self._ids):
            spare = np.zeros(16 + index // 2, dtype=np.int64)
            self._ids, self._counts = np.append(self._ids, spare), np.append(self._counts, spare.astype(np.float32))
        self._ids[index] = token
        self._counts[index] += 1

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return n token IDs, int64, and their counts, float32. Both are views that :meth:`add` changes."""
        n = len(self._index)
        return self._ids[:n], self._counts[:n]


class Sampler:
    """Sampling state of one completion: its random numbers and the counts of its tokens."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], stop_ids: Iterable[int]):
        self.params = params
        self._random = random.Random(params.seed)
        self._draws: deque[float] = deque()
        self.generated = 0
        self.stop_ids = sorted(stop_ids)
        p = params
        counts_tokens = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        self.counts = TokenCounts(prompt if p.repetition_penalty != 1 else ()) if counts_tokens else None
        """Counts for the penalties; None without any."""
        self._bias: tuple[Tensor, Tensor] | None = None

    @property
    def delays_end(self) -> bool:
        """True while ``min_tokens`` forbids stop tokens."""
        return bool(self.stop_ids) and self.generated < self.params.min_tokens

    @property
    def changes_logits(self) -> bool:
        return self.counts is not None or bool(self.params.logit_bias) or self.delays_end

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
        if self.counts is not None:
            self.counts.add(token)


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
    flat = logits.view(-1)
    _penalize(flat, vocab, samplers)
    if rows := [i for i, sampler in enumerate(samplers) if sampler.params.logit_bias]:
        biases = [samplers[i].bias(device) for i in rows]
        ids = torch.cat([ids + i * vocab for i, (ids, _) in zip(rows, biases)])
        flat[ids] += torch.cat([values for _, values in biases])
    if excluded := [i * vocab + token for i, s in enumerate(samplers) if s.delays_end for token in s.stop_ids]:
        flat[excluded] = float("-inf")


def _penalize(flat: Tensor, vocab: int, samplers: Sequence[Sampler]) -> None:
    """Apply the repetition, presence and frequency penalties to logits [B * vocab], in place."""
    counted = [(i, one.params, *one.counts.arrays()) for i, one in enumerate(samplers) if one.counts is not None]
    if not counted:
        return
    lengths = [len(ids) for _, _, ids, _ in counted]

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(flat.device)

    def each(value_of: Callable[[SamplingParams], float]) -> Tensor:
        return tensor(np.repeat(np.array([value_of(params) for _, params, _, _ in counted], np.float32), lengths))

    indices = tensor(np.concatenate([ids + i * vocab for i, _, ids, _ in counted]))
    counts = tensor(np.concatenate([counts for _, _, _, counts in counted]))
    logits, repetition = flat[indices], each(lambda p: p.repetition_penalty)
    logits = torch.where(logits > 0, logits / repetition, logits * repetition)
    frequency, presence = each(lambda p: p.frequency_penalty), each(lambda p: p.presence_penalty)
    flat[indices] = logits - (frequency * counts + presence * (counts > 0))
