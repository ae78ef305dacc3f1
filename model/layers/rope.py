"""Rotary position embeddings on the last dims of a vector, with interleaved pairs (2k, 2k + 1) and optional YaRN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.rotary import angles, rotate, rotate_halves


@dataclass(frozen=True)
class Yarn:
    """Parameters of YaRN (arXiv 2309.00071)."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float = 1.0
    """Factor of cosines and sines. DeepSeek-V4's is 1."""


@dataclass(frozen=True)
class Rotary:
    """Parameters of a rotary embedding of ``dim`` dims with base ``theta`` and optional YaRN scaling."""

    dim: int
    theta: float
    yarn: Yarn | None = None


class Rotation(NamedTuple):
    """Cosines and sines [B or 1, S, dim / 2] for the positions of S tokens."""

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor, inverse: bool = False) -> Tensor:
        """Rotate the last ``dim`` dims of x, [B, S, ..., n]; ``inverse`` rotates back. The other dims pass through."""
        return rotate(x, self.cos, self.sin, inverse)

    def apply_halves(self, x: Tensor) -> Tensor:
        """Rotate the pairs (k, k + dim / 2) of the first ``dim`` dims of x, [B, S, ..., n]."""
        return rotate_halves(x, self.cos, self.sin)


class RotaryFrequencies:
    """Angular frequencies of a rotary embedding, float64 [dim / 2], on the CPU even for a model on the meta device."""

    def __init__(self, rotary: Rotary):
        self.rotary = rotary
        """The family of these frequencies."""
        dim, theta = rotary.dim, rotary.theta
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
        if rotary.yarn is not None:
            frequencies = _scale_by_yarn(frequencies, rotary, rotary.yarn)
        self.frequencies = frequencies
        self._copies: dict[torch.device, Tensor] = {}
        self.factor = rotary.yarn.attention_factor if rotary.yarn is not None else 1.0

    def at(self, positions: Tensor) -> Rotation:
        """Return the rotation for positions int64 [B or 1, S], in float32."""
        cos, sin = angles(positions, self.frequencies if positions.is_cpu else self._on(positions.device))
        return Rotation(cos, sin) if self.factor == 1 else Rotation(cos * self.factor, sin * self.factor)

    def _on(self, device: torch.device) -> Tensor:
        """Return the copy on another device, made once: a copy per step would wait for it."""
        if device not in self._copies:
            with torch.inference_mode(False):
                self._copies[device] = self.frequencies.to(device)
        return self._copies[device]


def _scale_by_yarn(frequencies: Tensor, rotary: Rotary, yarn: Yarn) -> Tensor:
    """Divide low frequencies by YaRN's factor, keep high frequencies, and interpolate linearly in between."""
    dim = rotary.dim

    def dim_of(turns: float) -> float:
        """Return the fractional pair index that makes ``turns`` full turns over the original context."""
        return dim * math.log(yarn.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low = max(math.floor(dim_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / max(high - low, 1e-3)
    keep = 1 - ramp.clamp(0, 1)
    return frequencies * keep + frequencies / yarn.factor * (1 - keep)
