"""Settings of the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from kernels.hardware import multiplies_bf16_fast
from kernels.newton_schulz import V4_COEFFICIENTS
from model.errors import ConfigError
from model.wording import quote


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer; V4's published values where they exist (report 4.2.2).

    Raises ConfigError, naming the field, for values out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (refuses unknown keys when a recipe is read)

    rule: Literal["muon", "adamw"] = "muon"
    """``adamw`` applies AdamW to every parameter."""
    learning_rate: float = 3e-3
    """Rate of both rules: ``rms`` scales Muon's update to the RMS of AdamW's."""
    adamw_learning_rate: float | None = None
    """Rate of parameters under AdamW; None uses ``learning_rate``."""
    indexer_learning_rate: float | None = None
    """Rate of the indexers, which have a separate loss; None uses the rate of the parameter's rule."""
    weight_decay: float = 0.1
    momentum: float = 0.95
    rms: float = 0.18
    ns_coefficients: tuple[tuple[float, float, float], ...] = V4_COEFFICIENTS
    """Coefficients (a, b, c) of each Newton-Schulz step; V4 takes 8 fast steps and 2 converging ones."""
    ns_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the Newton-Schulz products; ``auto`` is bfloat16 if the device multiplies it faster than float32."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-20

    def __post_init__(self) -> None:
        for name in ("learning_rate", "adamw_learning_rate", "indexer_learning_rate", "rms", "eps"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name}: expected a finite number above 0, found {quote(value)}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ConfigError(f"weight_decay: expected a finite number of at least 0, found {quote(self.weight_decay)}")
        for name, value in (("momentum", self.momentum), ("betas.0", self.betas[0]), ("betas.1", self.betas[1])):
            if not 0 <= value < 1:
                raise ConfigError(f"{name}: must be at least 0 and below 1, found {quote(value)}")
        if not self.ns_coefficients or not all(math.isfinite(x) for step in self.ns_coefficients for x in step):
            raise ConfigError(
                f"ns_coefficients: expected at least one step of finite (a, b, c), found {quote(self.ns_coefficients)}"
            )

    def on(self, device: torch.device) -> OptimizerConfig:
        """Return the configuration with ``ns_dtype: auto`` resolved for ``device``."""
        if self.ns_dtype != "auto":
            return self
        return replace(self, ns_dtype="bfloat16" if multiplies_bf16_fast(device) else "float32")
