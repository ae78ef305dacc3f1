"""The state of one forward call that every layer sees."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor

from model.forward.aux_outputs import AuxOutputs
from model.forward.execution import Execution
from model.forward.packing import PackedDocuments
from model.layers.rope import Rotation

T = TypeVar("T")
AttentionMode = Literal["dense", "sparse"]


@dataclass(frozen=True)
class Context:
    """One forward call. Layers read it; results besides the activations go to ``aux``."""

    positions: Tensor
    """int64 [B or 1, S]: position of each token in its sequence or document."""
    rotation: Mapping[str, Rotation]
    """Rotations at these positions, by mixer name. Mixers without rotary positions have none."""
    attention: AttentionMode = "sparse"
    """``dense`` attends to every visible entry; indexers learn but do not select."""
    aux: AuxOutputs | None = None
    """Auxiliary losses, metrics and counts of this call."""
    documents: PackedDocuments | None = None
    """Documents packed into rows, which must not attend to one another."""
    forced_experts: Mapping[int, Tensor] = field(default_factory=dict)
    """int64 [B, S, K] by layer: experts to use instead of the router's choice."""
    execution: Execution = field(default_factory=Execution)
    _shared: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def batch_invariant(self) -> bool:
        return self.execution.batch_invariant

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return ``compute()``, computed once per ``key`` in a forward call and shared by all layers."""
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]
