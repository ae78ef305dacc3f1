"""What every sequence mixer gets and gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from model.config import ModelConfig
from model.documents import PackedDocuments
from model.execution import Execution
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
    execution: Execution = field(default_factory=Execution)


class Mixer(nn.Module):
    """Mixes a layer's tokens, in three steps: what each token gives, what the tokens give each other, and what each
    token makes of that. The first and the last treat every token on its own."""

    name: str

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        self.precision = Precision(config)

    def project(self, x: Tensor, rotation: Rotation, cached: bool) -> dict[str, Tensor]:
        """x [B, S, hidden] to whatever :meth:`mix` needs, with or without a cache, by name: [B, S, ...] each."""
        raise TypeError(f"{type(self).__name__} defines no project")

    def mix(self, projected: dict[str, Tensor], context: Context, cache: LayerCache | None) -> Tensor:
        """The attention proper: float32 [B, S, H, head_dim]. Token t's depends on tokens <= t only.

        ``cache`` is this layer's part of a :class:`model.cache.Cache`, or None for a whole sequence from its start.
        With a cache the past is read from it and the new tokens' state appended.
        """
        raise TypeError(f"{type(self).__name__} defines no mix")

    def output(self, mixed: Tensor, rotation: Rotation) -> Tensor:
        """[B, S, H, head_dim] -> [B, S, hidden]."""
        raise TypeError(f"{type(self).__name__} defines no output")
