"""Streams that the backward pass computes again instead of keeping them.

Between the two halves of a layer that is one product, and of what it takes the backward pass keeps everything anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import hyper_connections
from kernels.autocast import in_float32


class RecomputedStreams:
    """What :func:`expand` made of ``streams``, ``comb``, ``post`` and ``output`` (shapes as there)."""

    def __init__(self, expanded: Tensor, streams: Tensor, comb: Tensor, post: Tensor, output: Tensor):
        self._identity = _identity(expanded)
        self._inputs = [t.detach() for t in (streams, comb, post, output)]
        self._again: Tensor | None = None

    def not_saved(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context, throughout which ``expanded`` has to live: operations that would save it for their backward pass
        do not. The first of them that needs it computes it, for the others as well."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, saved: Tensor) -> Tensor | RecomputedStreams:
        # The tensor itself would hold the operation that holds it: a pass without a backward one was never let go.
        return self if _identity(saved) == self._identity else saved.detach()

    def _unpack(self, saved: Tensor | RecomputedStreams) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if self._again is None:
            streams, comb, post, output = self._inputs
            with torch.no_grad(), in_float32(streams):  # whatever surrounds the backward pass
                self._again = hyper_connections.expand(streams, comb, post, output)
        return self._again


def _identity(x: Tensor) -> tuple:
    return x.data_ptr(), x.shape, x.stride(), x.dtype
