"""What a forward pass reports besides its logits: auxiliary losses and measurements, per layer."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Telemetry:
    """Handed to the forward pass by whoever wants to know; filled by the layers.

    ``losses`` keep their graph, ``measures`` are detached. Both map a name to {layer index: scalar}.
    ``measure_selection`` also compares the indexer's choice with the dense attention it replaces (one more attention
    pass per csa layer, so only validation asks for it).
    """

    measure_selection: bool = False
    predict_ahead: bool = False
    """Run the multi-token prediction module as well and keep its logits."""
    mtp_logits: Tensor | None = None
    """float32 [B, S - 1, vocab]: at token t those of token t + 2."""
    losses: dict[str, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    measures: dict[str, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))

    def loss(self, name: str) -> Tensor | None:
        """The mean of loss ``name`` over the layers that reported it; None when none did."""
        values = list(self.losses.get(name, {}).values())
        return sum(values[1:], values[0]) / len(values) if values else None

    def means(self) -> dict[str, float]:
        """Losses and measures, each averaged over its layers."""
        return {
            name: sum(float(v.detach()) for v in per_layer.values()) / len(per_layer)
            for name, per_layer in {**self.losses, **self.measures}.items()
        }
