"""Rotary positions on the last dims of a vector: interleaved pairs (2k, 2k + 1), optionally stretched by YaRN."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.rotary import angles, rotate
from model.config import ModelConfig


class Rotation(NamedTuple):
    """Cosines and sines [B or 1, S, dim / 2] for the positions of S tokens."""

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor, inverse: bool = False) -> Tensor:
        """Rotate the last ``dim`` dims of x, [B, S, ..., n]; ``inverse`` rotates back. The other dims pass through."""
        return rotate(x, self.cos, self.sin, inverse)


class RotaryFrequencies:
    """Angular frequencies of one rotary family; :meth:`at` gives the rotation for any positions."""

    def __init__(self, dim: int, theta: float, config: ModelConfig | None = None):
        """With ``config``, YaRN as it prescribes. The amplitude factor stays 1.0, as released.

        The frequencies are real numbers on the CPU even where a model is built on the meta device.
        """
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
        if config is not None and config.yarn_factor > 1:
            frequencies = _yarn(frequencies, dim, theta, config)
        self.frequencies = frequencies

    def at(self, positions: Tensor) -> Rotation:
        """positions int64 [B or 1, S] -> Rotation in float32."""
        return Rotation(*angles(positions, self.frequencies))


def _yarn(frequencies: Tensor, dim: int, theta: float, config: ModelConfig) -> Tensor:
    """Divide slow frequencies by the factor, keep fast ones, blend linearly between (YaRN, arXiv 2309.00071)."""

    def dim_of(turns: float) -> float:
        """The (fractional) pair index that makes ``turns`` full turns over the original context."""
        return dim * math.log(config.yarn_original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dim_of(config.yarn_beta_fast)), 0)
    high = min(math.ceil(dim_of(config.yarn_beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / max(high - low, 1e-3)
    keep = 1 - ramp.clamp(0, 1)
    return frequencies * keep + frequencies / config.yarn_factor * (1 - keep)
