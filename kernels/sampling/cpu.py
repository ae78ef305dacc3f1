"""Sampling by a native operator."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels import native


def sample(
    logits: Tensor,
    uniform: Sequence[float],
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
) -> list[int]:
    """Implement :func:`kernels.sampling.sample` without gradients."""
    return native.op("sample")(logits, uniform, temperature, top_k, top_p, min_p)
