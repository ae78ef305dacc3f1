"""Completions that are decoded together."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from model.cache import Cache
from model.transformer import Transformer
from serve.engine.sequence import Sequence


class DecodeBatch:
    """Sequences whose caches are joined into one, so that a forward pass computes a token of each."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.cache: Cache | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    def add(self, sequences: list[Sequence]) -> None:
        """Add sequences and take over their caches."""
        if not sequences:
            return
        caches = [cache for cache in (self.cache, *(s.take_cache() for s in sequences)) if cache is not None]
        self.cache = caches[0] if len(caches) == 1 else Cache.join(caches)
        self.sequences += sequences

    def remove(self, sequences: Collection[Sequence]) -> None:
        """Remove sequences, if they are in the batch, and free their caches."""
        leaving = {id(sequence) for sequence in sequences}
        kept = [i for i, sequence in enumerate(self.sequences) if id(sequence) not in leaving]
        if len(kept) == len(self.sequences):
            return
        self.cache = self.cache.take(kept) if kept and self.cache is not None else None
        self.sequences = [self.sequences[i] for i in kept]

    def forward(self, model: Transformer) -> Tensor:
        """Append each sequence's last token and return the logits of its next one, [B, vocab]."""
        assert self.cache is not None
        last = torch.tensor([[sequence.tokens[-1]] for sequence in self.sequences], device=self.cache.device)
        return model(last, self.cache, last_only=True)[:, -1]
