"""Activation checkpointing: what a layer makes on the way, its residual streams above all, is made again in the
backward pass instead of kept. Memory then grows with the layers by their inputs only, for about a third more work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from model.mixers.base import Mixer
from model.moe import MixtureOfExperts
from model.telemetry import Telemetry

Result = TypeVar("Result")


def recomputed(
    layer: nn.Module, function: Callable[..., Result], telemetry: Telemetry | None, *arguments: object
) -> Result:
    """``function(*arguments)``, a pass through ``layer``, which comes again in the backward pass. The same result and
    gradients to the last bit: nothing in the network is drawn at random."""
    return checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _unreported(layer, telemetry)),
    )


@contextmanager
def _unreported(layer: nn.Module, telemetry: Telemetry | None) -> Iterator[None]:
    """What the second pass counts, tokens for each expert and tensors rounded, was counted in the first. What it
    reports was reported, too, and would keep all that the pass makes until the telemetry itself is let go."""
    loads = [(m, m.expert_load.clone()) for m in layer.modules() if isinstance(m, MixtureOfExperts)]
    precisions = [m.precision for m in layer.modules() if isinstance(m, Mixer | MixtureOfExperts)]
    rounded = [precision.rounded.copy() for precision in precisions]
    try:
        with nullcontext() if telemetry is None else telemetry.set_aside():
            yield
    finally:
        for module, load in loads:
            module.expert_load.copy_(load)
        for precision, counts in zip(precisions, rounded):
            precision.rounded = counts
