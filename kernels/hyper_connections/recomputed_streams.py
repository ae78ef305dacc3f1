"""Streams between the two halves of a layer that are recomputed in the backward pass instead of saved.

They are the result of one :func:`kernels.hyper_connections.hc_post`, whose inputs the backward pass saves anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import hyper_connections
from kernels.autocast import in_float32


class RecomputedStreams:
    """A handle on ``expanded = hc_post(streams, comb, post, output)`` that can recompute it. Shapes as there."""

    def __init__(self, expanded: Tensor, streams: Tensor, comb: Tensor, post: Tensor, output: Tensor):
        self._identity = _identity(expanded)
        self._inputs = [t.detach() for t in (streams, comb, post, output)]
        self._recomputed: Tensor | None = None

    def not_saved(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Return a context in which operations do not save ``expanded`` for their backward pass.

        The first backward pass that needs it recomputes it for all of them. ``expanded`` must stay alive within the
        context.
        """
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, saved: Tensor) -> Tensor | RecomputedStreams:
        # Detach: a tensor that refers to the operation that saves it would form a reference cycle, and a forward pass
        # without a backward pass would never be freed.
        return self if _identity(saved) == self._identity else saved.detach()

    def _unpack(self, saved: Tensor | RecomputedStreams) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if self._recomputed is None:
            streams, comb, post, output = self._inputs
            with torch.no_grad(), in_float32(streams):  # the backward pass may run under autocast
                self._recomputed = hyper_connections.hc_post(streams, comb, post, output)
        return self._recomputed


def _identity(x: Tensor) -> tuple:
    return x.data_ptr(), x.shape, x.stride(), x.dtype
