"""One layer of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from model import batch_invariant
from model.config import ModelConfig
from model.feed_forward import DenseFeedForward
from model.forward.context import Context
from model.layers.hyper_connections import residual
from model.layers.norm import RMSNorm
from model.mixers import MIXERS
from model.moe import MixtureOfExperts

if TYPE_CHECKING:
    from model.cache.layer_cache import LayerCache


class Block(nn.Module):
    """A sequence mixer and, unless ``ffn`` is none, a feed-forward block, each with its own norm and residual.

    ``layer`` counts from 0.
    """

    def __init__(self, config: ModelConfig, mixer: str, layer: int):
        super().__init__()
        self.attn = MIXERS[mixer](config, layer)
        kind = config.block_ffn_kinds[layer]
        self.ffn: MixtureOfExperts | DenseFeedForward | None = None
        if kind != "none":
            self.ffn = MixtureOfExperts(config, layer) if kind == "moe" else DenseFeedForward(config, config.ffn_size)
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn_residual = residual(config)
        if self.ffn is not None:
            self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.ffn_residual = residual(config)
        self.recompute_streams = True
        """Recompute the residual streams between the two halves in the backward pass, for one matrix product."""

    def forward(self, streams: Tensor, input_ids: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """Return the next streams for streams [B, S, n, hidden] ([B, S, hidden] without hyper-connections) and
        input_ids int64 [B, S]."""
        if context.batch_invariant:
            return batch_invariant.run_block(self, streams, input_ids, context, cache)

        x, mixing = self.attn_residual.enter(streams, self.attn_norm)
        out = self.attn(x, context, cache)
        between = self.attn_residual.leave(streams, mixing, out)
        if self.ffn is None:
            return between

        recompute = self.training and self.recompute_streams
        recomputed = self.attn_residual.to_recompute(between, streams, mixing, out) if recompute else None
        x, mixing = self.ffn_residual.enter(between, self.ffn_norm, recomputed)
        out = self.ffn(x, input_ids, context)
        return self.ffn_residual.leave(between, mixing, out)
