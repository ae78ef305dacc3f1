"""What every sequence mixer gets and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from model.config import ModelConfig
from model.documents import PackedDocuments
from model.precision import Precision
from model.rope import Rotation
from model.telemetry import Telemetry

if TYPE_CHECKING:
    from model.cache import LayerCache

AttentionMode = Literal["dense", "sparse"]


@dataclass(frozen=True)
class Context:
    """One forward call, seen from a layer."""

    positions: Tensor
    """int64 [B or 1, S]: every token's place in its sequence or document."""
    rotation: dict[str, Rotation]
    """For the tokens' positions, by mixer name."""
    attention: AttentionMode = "sparse"
    """dense lets csa layers attend to every visible entry; their indexers learn but do not choose."""
    telemetry: Telemetry | None = None
    documents: PackedDocuments | None = None
    """Rows that hold several documents, which must not see one another."""


class Mixer(nn.Module):
    """Mixes a layer's tokens: forward(x [B, S, hidden], context, cache) -> [B, S, hidden].

    ``cache`` is this layer's part of a :class:`model.cache.Cache`, or None for a whole sequence from its start. With a
    cache the mixer reads the past from it and appends the new tokens' state. Output t depends on tokens <= t only.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        self.precision = Precision(config)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no forward")
