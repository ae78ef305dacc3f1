"""Speculative decoding: tokens are drafted by the multi-token prediction module and checked by the network.

A decoding step reads each completion's last token and its drafts in one forward pass. Then it samples tokens in order,
as without drafts, until one differs from its draft. Draft and sample of a token use the same random number (inverse
transform sampling from the module's and from the network's distribution). Therefore

* a completion's tokens are those of decoding without drafts, whatever is drafted: the same distribution, and the same
  tokens for a seed, up to the rounding of logits in a wider forward pass (``batch-invariant`` gives the same bits);
* a draft is accepted with a probability that approaches 1 as the two distributions approach each other. For a draft
  that is certain, such as a greedy one, this is the rejection sampling of arXiv:2211.17192.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.cache import Cache
from model.cache.parts import RecurrentPart, WindowPart
from model.config import ModelConfig
from model.errors import ConfigError
from model.transformer import Transformer
from serve.engine.sampler import predict_tokens
from serve.engine.sequence import Sequence


def check_speculation(config: ModelConfig, count: int) -> None:
    """Raise ConfigError unless the network can draft ``count`` tokens and its cache can drop rejected ones."""
    if not config.mtp_layers:
        raise ConfigError(
            "speculative_tokens: the model has no multi-token prediction module (mtp_layers is 0); expected 0, found "
            f"{count}"
        )
    for mixer in config.mixers:
        if any(isinstance(part, RecurrentPart) for part in mixer.cache_parts(config).values()):
            raise ConfigError(
                f"speculative_tokens: layers of '{mixer.name}' keep a recurrent state, from which rejected tokens "
                f"cannot be removed; expected 0, found {count}"
            )


class Drafter:
    """Drafts ``count`` tokens per completion with the network's multi-token prediction module.

    The module has one step of lookahead; further drafts feed its own hidden states back to it. Its cache has a row for
    each token that has a successor. Drafts have IDs below ``vocab_size``.
    """

    def __init__(self, model: Transformer, count: int, vocab_size: int | None = None):
        check_speculation(model.config, count)
        self.model, self.count, self._vocab_size = model, count, vocab_size
        parts = model.config.block_mixers[-1].cache_parts(model.config).values()
        self._reach = max(part.tokens for part in parts if isinstance(part, WindowPart))
        """Tokens that the module sees at a time."""

    def read(self, sequence: Sequence, hidden: Tensor) -> None:
        """Run the module over prompt tokens that the network has just read, with hidden states [1, n, ...].

        Drafting starts at the end of the prompt or of a kept prefix. Tokens out of the module's reach from the next
        such end are skipped. The last row of a kept prefix holds the successor from the prompt that stored it, which
        affects only drafts.
        """
        assert sequence.cache is not None
        end = sequence.computed
        needed = min(length for length in (*sequence.boundaries, len(sequence.tokens)) if length >= end)
        count = min(hidden.shape[1], end - (needed - self._reach))
        if count > 0:
            self._run_module([sequence], sequence.cache, hidden[:, -count:])

    def draft(self, sequences: list[Sequence], cache: Cache, hidden: Tensor) -> None:
        """Remove rejected drafts from ``cache`` and draft the tokens of the next step, given the hidden states
        [B, n, ...] of the newest n tokens in the cache, rejected ones included."""
        ahead = self._run_module(sequences, cache, hidden[:, -(self._reach + self.count) :])
        lengths = [len(sequence.tokens) - 1 for sequence in sequences]
        offsets = [ahead.shape[1] - 1 - (now - kept) for now, kept in zip(cache.lengths, lengths)]
        newest = ahead[range(len(sequences)), offsets].unsqueeze(1)
        cache.truncate(lengths)
        samplers = [sequence.sampler for sequence in sequences]
        drafts: list[list[int]] = []
        for step in range(self.count):
            if step:
                ids = torch.tensor(drafts[-1], device=cache.device).unsqueeze(1)
                newest = self.model.read_ahead(newest, ids, cache, [length + step - 1 for length in lengths])
            predicted = predict_tokens(self.model.ahead_logits(newest)[:, -1, : self._vocab_size], samplers, step)
            drafts.append([max(0, token) for token in predicted])  # any token will do where logits are not finite
        for sequence, own in zip(sequences, zip(*drafts)):
            sequence.drafts = list(own)

    def _run_module(self, sequences: list[Sequence], cache: Cache, hidden: Tensor) -> Tensor:
        """Run the module over the newest n tokens in the cache, with hidden states [B, n, ...]. Successors of rejected
        tokens are arbitrary."""
        count = hidden.shape[1]
        starts = [length - count for length in cache.lengths]
        padded = [(sequence.tokens[start + 1 :] + [0] * count)[:count] for sequence, start in zip(sequences, starts)]
        return self.model.read_ahead(hidden, torch.tensor(padded, device=cache.device), cache, starts)
