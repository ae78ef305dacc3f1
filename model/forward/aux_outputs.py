"""Auxiliary outputs of a forward pass: losses, metrics and counts, per layer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


class AuxOutputs:
    """Auxiliary outputs, filled by the layers of a forward pass that was given one.

    ``losses`` keep their graph, ``metrics`` are detached. Both map a name to {layer index: scalar}.
    ``measure_selection`` compares the indexers' selections with the dense attention they replace, which takes one more
    attention pass per indexed layer. ``predict_ahead`` runs the multi-token prediction module and keeps its logits.
    """

    # Not a dataclass: FSDP copies dataclass arguments, so writes would be lost.

    def __init__(self, measure_selection: bool = False, predict_ahead: bool = False):
        self.measure_selection, self.predict_ahead = measure_selection, predict_ahead
        self.mtp_logits: Tensor | None = None
        """float32 [B, S - 1, vocab]: predictions at token t of token t + 2."""
        self._clear()

    def _clear(self) -> None:
        self.losses: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self.metrics: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self.expert_ids: dict[int, Tensor] = {}
        """int64 [B, S, K] by layer: the experts that a router chose in training."""
        self.expert_load: dict[int, Tensor] = {}
        """int64 [experts] by layer: tokens per expert in training, padding excluded."""
        self.rounded: Counter[str] = Counter()
        """Tensors rounded by quantization-aware training, by role: main, index, gqa, mla, convolution, experts."""

    @contextmanager
    def discard(self) -> Iterator[None]:
        """Discard outputs that layers add within the block."""
        kept = dict(vars(self))
        self._clear()
        try:
            yield
        finally:
            vars(self).update(kept)

    def loss(self, name: str) -> Tensor | None:
        """Return the mean of loss ``name`` over the layers that have it, or None if none has."""
        values = list(self.losses.get(name, {}).values())
        return sum(values[1:], values[0]) / len(values) if values else None

    def by_layer(self, names: Iterable[str]) -> dict[str, float]:
        """Return the losses and metrics among ``names`` that exist: each one's mean over layers under its name, and the
        value of each layer as ``<name>/layer_<index>``."""
        found: dict[str, float] = {}
        for name in names:
            values = {**self.losses, **self.metrics}.get(name, {})
            if values:
                each = {f"{name}/layer_{layer}": float(value.detach()) for layer, value in values.items()}
                found |= {name: sum(each.values()) / len(each), **each}
        return found
