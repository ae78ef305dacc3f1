"""Rounding to a storage format by a Triton kernel."""

from __future__ import annotations

from kernels.cache_io.triton import round_to_format

__all__ = ["round_to_format"]
