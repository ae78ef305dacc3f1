"""Activation checkpointing: recompute a layer's activations in the backward pass instead of keeping them.

Memory then grows with the layers' inputs only, for about a third more work.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

from torch.utils.checkpoint import checkpoint

from model.forward.aux_outputs import AuxOutputs

Result = TypeVar("Result")


def checkpointed(function: Callable[..., Result], aux: AuxOutputs | None, *arguments: object) -> Result:
    """Return ``function(*arguments)`` and run it again in the backward pass. Result and gradients keep their bits: the
    network draws no random numbers.

    Auxiliary outputs of the second pass are discarded. They exist already, and keeping them would pin its activations.
    """
    return checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), nullcontext() if aux is None else aux.discard()),
    )
