"""The loss of the lightning indexer: its divergence from the attention whose entries it selects.

The rule is that of the DeepSeek-V3.2 report (2.1); V4's gives none.
"""

from __future__ import annotations

from torch import Tensor

from kernels.backends import get_backend
from kernels.entry_ranges import EntryRanges
from kernels.indexer_kl import eager, reference, triton
from kernels.sparse_attention import EntryMass
from kernels.triton_support.platform import can_run

__all__ = ["BACKENDS", "backend_for", "indexer_kl"]

BACKENDS = {"reference": reference, "eager": eager, "triton": triton}


def backend_for(query: Tensor) -> str:
    """Return the backend for index queries."""
    return "triton" if can_run(query) and triton.supports(query) else "eager"


def indexer_kl(
    query: Tensor,
    keys: Tensor,
    head_weights: Tensor,
    mass: EntryMass,
    visible: EntryRanges,
    chosen: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return KL(teacher || softmax(scores)) over the permitted entries, averaged over queries that have any.

    The teacher is the attention mass of the joint softmax, normalized over the permitted entries. The scores are
    :func:`kernels.index_scores.index_scores`. ``eager`` and ``triton`` compute the gradients in the forward pass, for
    one block of queries at a time: neither the mass nor the scores of all queries exist at once.

    Args:
        query: float32 [B, S, h, c], index queries.
        keys: float32 [B, T, c], index keys.
        head_weights: float32 [B, S, h], already scaled.
        mass: Attention mass of the permitted entries. That of others has no effect.
        visible: The permitted entries of every query.
        chosen: int [B, S, K], the permitted entries in place of all ``visible`` ones, each at most once; -1 in unused
            slots. The mass is that of these slots.

    Returns:
        A scalar, float32, with gradients of ``query``, ``keys`` and ``head_weights``.
    """
    loss = get_backend(BACKENDS, backend or backend_for(query)).indexer_kl
    return loss(query, keys, head_weights, mass, visible, chosen)
