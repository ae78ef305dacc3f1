"""Completions that are decoded together."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from model.cache import Cache
from model.decode_graphs import DecodeGraphs
from model.transformer import Transformer
from serve.engine.sequence import Sequence


class DecodeBatch:
    """Sequences whose caches are joined into one, so that a forward pass computes a token of each."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.cache: Cache | None = None
        self.hidden: Tensor | None = None
        """Hidden states of the newest step, [B, S, ...]. None before the first step and after other sequences have
        joined."""

    def __len__(self) -> int:
        return len(self.sequences)

    def add(self, sequences: list[Sequence]) -> None:
        """Add sequences and take over their caches."""
        if not sequences:
            return
        caches = [cache for cache in (self.cache, *(s.take_cache() for s in sequences)) if cache is not None]
        self.cache = caches[0] if len(caches) == 1 else Cache.join(caches)
        self.sequences += sequences
        self.hidden = None

    def remove(self, sequences: Collection[Sequence]) -> None:
        """Remove sequences, if they are in the batch, and free their caches."""
        leaving = {id(sequence) for sequence in sequences}
        kept = [i for i, sequence in enumerate(self.sequences) if id(sequence) not in leaving]
        if len(kept) == len(self.sequences):
            return
        self.cache = self.cache.take(kept) if kept and self.cache is not None else None
        self.hidden = self.hidden[kept] if kept and self.hidden is not None else None
        self.sequences = [self.sequences[i] for i in kept]

    def forward(self, model: Transformer, drafts: int = 0, graphs: DecodeGraphs | None = None) -> Tensor:
        """Append each sequence's last token and its first ``drafts`` drafts. Return the logits of the token after each,
        [B, 1 + drafts, vocab]. With ``graphs``, steps are replayed and leave no hidden states."""
        assert self.cache is not None
        rows = [[sequence.tokens[-1], *sequence.drafts[:drafts]] for sequence in self.sequences]
        ids = torch.tensor(rows, device=self.cache.device)
        if graphs is not None:
            return graphs.logits(ids, self.cache)
        self.hidden = model.read(ids, self.cache)
        return model.logits(self.hidden)
