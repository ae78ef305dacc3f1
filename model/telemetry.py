"""What a forward pass reports besides its logits: auxiliary losses and measurements, per layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


class Telemetry:
    """Handed to the forward pass by whoever wants to know; filled by the layers.

    ``losses`` keep their graph, ``measures`` are detached. Both map a name to {layer index: scalar}.
    ``measure_selection`` also compares the indexer's choice with the dense attention it replaces (one more attention
    pass per csa layer, so only validation asks for it). ``predict_ahead`` runs the multi-token prediction module as
    well and keeps its logits.
    """

    # No dataclass: of those FSDP gives a layer copies, and what the layer says would be lost.

    def __init__(self, measure_selection: bool = False, predict_ahead: bool = False):
        self.measure_selection, self.predict_ahead = measure_selection, predict_ahead
        self.mtp_logits: Tensor | None = None
        """float32 [B, S - 1, vocab]: at token t those of token t + 2."""
        self.chosen: dict[int, Tensor] = {}
        """int64 [B, S, K] by layer: the experts of every token in training, where a router chose them."""
        self.losses: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self.measures: dict[str, dict[int, Tensor]] = defaultdict(dict)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """What layers report meanwhile is forgotten."""
        kept = self.chosen, self.losses, self.measures
        self.chosen, self.losses, self.measures = {}, defaultdict(dict), defaultdict(dict)
        try:
            yield
        finally:
            self.chosen, self.losses, self.measures = kept

    def loss(self, name: str) -> Tensor | None:
        """The mean of loss ``name`` over the layers that reported it; None when none did."""
        values = list(self.losses.get(name, {}).values())
        return sum(values[1:], values[0]) / len(values) if values else None

    def by_layer(self, names: Iterable[str]) -> dict[str, float]:
        """Of the losses and measures ``names``, those there are: the mean over layers, and each as
        ``<name>/layer_<index>``."""
        found: dict[str, float] = {}
        for name in names:
            values = {**self.losses, **self.measures}.get(name, {})
            if values:
                each = {f"{name}/layer_{layer}": float(value.detach()) for layer, value in values.items()}
                found |= {name: sum(each.values()) / len(each), **each}
        return found
