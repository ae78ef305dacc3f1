"""One layer of the network."""

from __future__ import annotations

from torch import Tensor, nn

from model.cache_parts import LayerCache
from model.config import ModelConfig
from model.hyper_connections import residual
from model.mixers import build_mixer
from model.mixers.base import Context
from model.moe import DenseFeedForward, MixtureOfExperts
from model.norm import RMSNorm


class Block(nn.Module):
    """A sequence mixer and a feed-forward, each with its own norm and residual. ``layer`` counts from 0."""

    def __init__(self, config: ModelConfig, mixer: str, layer: int):
        super().__init__()
        self.attn = build_mixer(mixer, config, layer)
        self.ffn: nn.Module = (
            MixtureOfExperts(config, layer) if config.ffn == "moe" else DenseFeedForward(config, config.ffn_size)
        )
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn_residual = residual(config)
        self.ffn_residual = residual(config)

    def forward(self, streams: Tensor, input_ids: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """streams [B, S, n, hidden] ([B, S, hidden] without hyper-connections), input_ids int64 [B, S] -> streams."""
        streams = self.attn_residual(streams, lambda x: self.attn(self.attn_norm(x), context, cache))
        return self.ffn_residual(streams, lambda x: self.ffn(self.ffn_norm(x), input_ids, context))
