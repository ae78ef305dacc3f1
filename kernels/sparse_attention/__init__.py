"""Attention over a sliding window, compressed entries and a sink, in one softmax."""

from kernels.sparse_attention.packed import INVARIANT_TILE, TiledAttention, packed_attention, token_attention
from kernels.sparse_attention.reference import sparse_attention

__all__ = ["INVARIANT_TILE", "TiledAttention", "packed_attention", "sparse_attention", "token_attention"]
