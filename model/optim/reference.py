"""Reference implementation of the two update rules, one matrix at a time. :mod:`model.optim.muon_adamw` is the fast
one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.newton_schulz import newton_schulz
from model.optim.muon_adamw import OptimizerConfig


def muon_step(
    weight: Tensor, gradient: Tensor, momentum: Tensor, lr: float, config: OptimizerConfig, stacked: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the new weight and momentum of one matrix [r, c] (report algorithm 1).

    Unlike there, a matrix of a stack (``stacked``) whose gradient is zero keeps its weight. ``config.ns_dtype`` must be
    resolved (:meth:`OptimizerConfig.on`).
    """
    momentum = config.momentum * momentum + gradient
    if stacked and not gradient.any():
        return weight, momentum
    ahead = config.momentum * momentum + gradient  # Nesterov
    dtype = getattr(torch, config.ns_dtype)
    update = newton_schulz(ahead, config.ns_coefficients, dtype, backend="reference")
    update = update * math.sqrt(max(weight.shape)) * config.rms
    return (1 - lr * config.weight_decay) * weight - lr * update, momentum


def adamw_step(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, lr: float, config: OptimizerConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the new weight and both moments. ``step`` counts from 1. One-dimensional parameters do not decay."""
    beta1, beta2 = config.betas
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient.square()
    update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + config.eps)
    decay = config.weight_decay if weight.dim() > 1 else 0.0
    return (1 - lr * decay) * weight - lr * update, first, second
