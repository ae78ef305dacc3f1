"""Multi-token prediction: a small module that looks one token further ahead than the network (V3 report 2.2)."""

from __future__ import annotations

from torch import Tensor

from model.block import Block
from model.config import ModelConfig
from model.hyper_connections import HyperHead
from model.linear import Linear
from model.mixers.base import Context
from model.norm import RMSNorm


class PredictAhead(Block):
    """At token t, from the network's streams and the embedding of token t + 1, what the head needs to tell token t + 2.

    As in the released code: two projections with norms of their own (V3 has one of twice the width), the embedding's
    added to every stream, then one sliding-window block with a scored mixture of experts, a stream head and a norm.
    Embedding and head are the network's.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config, "sliding", layer=config.num_layers)
        self.enorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.e_proj = Linear(config.hidden_size, config.hidden_size)
        self.h_proj = Linear(config.hidden_size, config.hidden_size)
        self.hyper_head = HyperHead(config) if config.hyper_connections else None
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def hidden(self, streams: Tensor, next_embedding: Tensor, next_ids: Tensor, context: Context) -> Tensor:
        """streams [B, S, n, hidden] ([B, S, hidden] without hyper-connections) of tokens t; embeddings [B, S, hidden]
        and ids int64 [B, S] of tokens t + 1 -> normalised [B, S, hidden], float32."""
        ahead = self.e_proj(self.enorm(next_embedding))
        past = self.h_proj(self.hnorm(streams))
        streams = (past + (ahead.unsqueeze(2) if self.hyper_head is not None else ahead)).float()
        # Not self(...): a sharded network gathers this module's matrices around all of ``hidden``, and once.
        streams = self.forward(streams, next_ids, context)
        return self.norm(self.hyper_head(streams) if self.hyper_head is not None else streams)
