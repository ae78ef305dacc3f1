"""One layer of the network."""

from __future__ import annotations

from torch import Tensor, nn

from model.cache_parts import LayerCache
from model.config import ModelConfig
from model.hyper_connections import Mixing, residual
from model.mixers import build_mixer
from model.mixers.base import Context
from model.moe import DenseFeedForward, MixtureOfExperts
from model.norm import RMSNorm
from model.rope import Rotation


class Block(nn.Module):
    """A sequence mixer and a feed-forward, each with its own norm and residual. ``layer`` counts from 0."""

    def __init__(self, config: ModelConfig, mixer: str, layer: int):
        super().__init__()
        self.attn = build_mixer(mixer, config, layer)
        self.ffn: MixtureOfExperts | DenseFeedForward = (
            MixtureOfExperts(config, layer) if config.ffn == "moe" else DenseFeedForward(config, config.ffn_size)
        )
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn_residual = residual(config)
        self.ffn_residual = residual(config)
        self.recomputes_streams = True
        """Whether the backward pass of training computes the streams between the two again: one product."""

    def forward(self, streams: Tensor, input_ids: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """streams [B, S, n, hidden] ([B, S, hidden] without hyper-connections), input_ids int64 [B, S] -> streams."""
        execution, rotation = context.execution, context.rotation[self.attn.name]
        mixing, projected = execution.tokenwise(Block.before_mixing, self, streams, rotation, cache is not None)
        mixed = self.attn.mix(projected, context, cache)
        streams, mixing, routed = execution.tokenwise(
            Block.before_experts, self, streams, mixing, mixed, rotation, input_ids
        )
        out = self.ffn.mixture(routed, context)
        return execution.tokenwise(Block.after_experts, self, streams, mixing, out)

    # The parts that treat every token on its own.

    def before_mixing(self, streams: Tensor, rotation: Rotation, cached: bool) -> tuple[Mixing, dict[str, Tensor]]:
        x, mixing = self.attn_residual.enter(streams)
        return mixing, self.attn.project(self.attn_norm(x), rotation, cached)

    def before_experts(
        self, streams: Tensor, mixing: Mixing, mixed: Tensor, rotation: Rotation, input_ids: Tensor
    ) -> tuple[Tensor, Mixing, dict[str, Tensor]]:
        out = self.attn.output(mixed, rotation)
        between = self.attn_residual.leave(streams, mixing, out)
        again = self.training and self.recomputes_streams
        recomputed = self.attn_residual.to_recompute(between, streams, mixing, out) if again else None
        x, mixing = self.ffn_residual.enter(between, recomputed)
        return between, mixing, self.ffn.route(self.ffn_norm(x), input_ids)

    def after_experts(self, streams: Tensor, mixing: Mixing, out: Tensor) -> Tensor:
        return self.ffn_residual.leave(streams, mixing, out)
