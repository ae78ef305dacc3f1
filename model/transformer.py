"""The network: embedding, layers of (mixer, feed-forward) around residual streams, head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.cache import Cache, LayerCache
from model.config import ModelConfig
from model.hyper_connections import HyperConnection, HyperHead, residual
from model.mixers import build_mixer
from model.mixers.base import AttentionMode, Context
from model.mixers.compressor import Compressor
from model.moe import DenseFeedForward, MixtureOfExperts
from model.norm import RMSNorm
from model.precision import in_float32
from model.rope import RotaryFrequencies
from model.telemetry import Telemetry


class Block(nn.Module):
    """One layer: a sequence mixer and a feed-forward, each with its own norm and residual."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn = build_mixer(config.layers[layer], config, layer)
        self.ffn: nn.Module = (
            MixtureOfExperts(config, layer) if config.ffn == "moe" else DenseFeedForward(config, config.ffn_size)
        )
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn_residual = residual(config)
        self.ffn_residual = residual(config)

    def forward(self, streams: Tensor, input_ids: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        streams = self.attn_residual(streams, lambda x: self.attn(self.attn_norm(x), context, cache))
        return self.ffn_residual(streams, lambda x: self.ffn(self.ffn_norm(x), input_ids, context.telemetry))


class Transformer(nn.Module):
    """A DeepSeek-V4-style language model (or a baseline, by its layer schedule)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.hyper_head = HyperHead(config) if config.hyper_connections else None
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        rope = config.rope_head_dim
        sliding = RotaryFrequencies(rope, config.rope_theta)
        compressed = RotaryFrequencies(rope, config.compress_rope_theta, config)
        self._frequencies = {
            "sliding": sliding,
            "csa": compressed,
            "hca": compressed,
            "gqa": RotaryFrequencies(config.head_dim, config.rope_theta),
        }
        self.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        attention: AttentionMode = "sparse",
        telemetry: Telemetry | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Next-token logits, float32 [B, S, vocab] ([B, 1, vocab] with ``last_only``), for input_ids int64 [B, S].

        With a cache the tokens follow those it holds and are appended to it, in pieces of any size; without, they are
        whole sequences. ``attention="dense"`` is the curriculum's warm-up and works without a cache only.
        Raises CacheError, before anything is changed, when the tokens do not fit the cache.
        """
        if cache is not None:
            cache.check_room(*input_ids.shape)
            if attention != "sparse":
                raise ValueError("attention: a cache serves sparse attention only")
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        rotation = {name: self._frequencies[name].at(positions) for name in set(self.config.layers)}
        context = Context(start, rotation, attention, telemetry)

        streams = self.embed(input_ids).float()
        if self.config.hyper_connections:
            streams = streams.unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)
        for layer, block in enumerate(self.layers):
            streams = block(streams, input_ids, context, cache.layers[layer] if cache is not None else None)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        if last_only:
            streams = streams[:, -1:]
        x = self.hyper_head(streams) if self.hyper_head is not None else streams
        with in_float32(x):
            return nn.functional.linear(self.norm(x), self.head.weight.float())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights afresh: normal with ``init_std``, norms one, sinks, biases and position biases zero."""
        for module in self.modules():
            if isinstance(module, HyperConnection | HyperHead):
                module.reset()
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(std=self.config.init_std)
            elif isinstance(module, MixtureOfExperts):
                for weight in (module.w1, module.w2, module.w3):
                    weight.normal_(std=self.config.init_std)
            elif isinstance(module, Compressor):
                module.ape.zero_()
        for name, parameter in self.named_parameters():
            last = name.rsplit(".", 2)
            if last[-1] == "wo_a":
                parameter.normal_(std=self.config.init_std)
            elif last[-1] == "sink":
                parameter.zero_()
            if self.config.zero_init_output and (last[-2] in ("wo_b", "wo", "w2") or last[-1] == "w2"):
                parameter.zero_()

    def moe_layers(self) -> list[MixtureOfExperts]:
        return [block.ffn for block in self.layers if isinstance(block.ffn, MixtureOfExperts)]

    def indexer_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if ".indexer." in name]

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())
