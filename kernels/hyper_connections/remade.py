"""Streams that the backward pass makes again instead of keeping them.

Between the two halves of a layer that is one product, and of what it takes the backward pass keeps everything anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.hyper_connections import batched


class Remade:
    """What :func:`expand` made of ``streams``, ``comb``, ``post`` and ``output``."""

    def __init__(self, made: Tensor, streams: Tensor, comb: Tensor, post: Tensor, output: Tensor):
        self._place, self._shape = made.data_ptr(), made.shape
        self._made_of = [t.detach() for t in (streams, comb, post, output)]
        self._again: Tensor | None = None

    def not_kept(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context, in which ``made`` has to be there still: operations that would keep it for their backward pass do
        not. The first of them that needs it makes it, for the others as well."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, kept: Tensor) -> Tensor | Remade:
        return self if kept.data_ptr() == self._place and kept.shape == self._shape else kept

    def _unpack(self, kept: Tensor | Remade) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self._again is None:
            with torch.no_grad():
                self._again = batched.expand(*self._made_of)
        return self._again
