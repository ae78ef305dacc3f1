"""Attention over a sliding window, compressed entries and a sink, in one softmax."""

from kernels.sparse_attention.reference import sparse_attention

__all__ = ["sparse_attention"]
