"""Multi-token prediction: a module that predicts one token further ahead than the network (V3 report 2.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from model.block import Block
from model.config import MTP_MIXER, ModelConfig
from model.forward.context import Context
from model.layers.hyper_connections import HyperHead
from model.layers.linear import Linear
from model.layers.norm import RMSNorm

if TYPE_CHECKING:
    from model.cache.layer_cache import LayerCache


class PredictAhead(Block):
    """Predicts token t + 2 at token t, from the network's streams and the embedding of token t + 1.

    As in the released code: two projections, each with a norm (V3 has one of twice the width), of which the embedding's
    is added to every stream; then one sliding-window block with a scored mixture of experts, a stream head and a norm.
    Embedding and head are the network's.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config, MTP_MIXER, layer=config.num_layers)
        self.enorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.e_proj = Linear(config.hidden_size, config.hidden_size)
        self.h_proj = Linear(config.hidden_size, config.hidden_size)
        self.hyper_head = HyperHead(config) if config.hyper_connections else None
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def hidden(self, streams: Tensor, next_embedding: Tensor, next_ids: Tensor, context: Context) -> Tensor:
        """Return the input of the output head, normalized, float32 [B, S, hidden].

        ``streams`` [B, S, n, hidden], without hyper-connections [B, S, hidden], are those of tokens t;
        ``next_embedding`` [B, S, hidden] and ``next_ids`` int64 [B, S] belong to tokens t + 1.
        """
        # Not self(...): FSDP gathers this module's matrices once, around all of ``hidden``.
        return self.combine(self.extend(streams, next_embedding, next_ids, context))

    def extend(
        self,
        streams: Tensor,
        next_embedding: Tensor,
        next_ids: Tensor,
        context: Context,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Return the module's own streams for the arguments of :meth:`hidden`, of the shape of ``streams``."""
        ahead = self.e_proj(self.enorm(next_embedding))
        past = self.h_proj(self.hnorm(streams))
        streams = (past + (ahead.unsqueeze(2) if self.hyper_head is not None else ahead)).float()
        return self.forward(streams, next_ids, context, cache)

    def combine(self, streams: Tensor) -> Tensor:
        """Return the normalized input of the output head, [B, S, hidden], for streams of :meth:`extend`."""
        return self.norm(self.hyper_head(streams) if self.hyper_head is not None else streams)
