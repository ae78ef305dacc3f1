"""Pooling of neighbouring tokens into one compressed entry."""

from kernels.compress.reference import compress

__all__ = ["compress"]
