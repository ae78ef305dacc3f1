"""The optimizer: Muon for matrices, AdamW for the rest, behind one step, one state and one printed table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kernels.newton_schulz import V4_COEFFICIENTS, newton_schulz
from model.errors import CheckpointError, ConfigError

ADAMW_NAMES = re.compile(
    r"(^|\.)(embed|head|norm|attn_norm|ffn_norm|q_norm|kv_norm)\.|\.(base|scale|sink|ape)$|(^|\.)hyper_head\."
)
"""AdamW by role (report 2.4): embedding, head, norms, mHC biases and gates. Ours to decide: sink logits (1-D) and the
compressors' position biases, which are bias tables and not maps, whatever their shape."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Published values of V4 where there are any (report 4.2.2)."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (refuses unknown keys when a recipe is read)

    rule: Literal["muon", "adamw"] = "muon"
    """adamw gives every parameter to AdamW: the switch that takes Muon away."""
    learning_rate: float = 3e-3
    """Muon's update is scaled to AdamW's RMS (``rms``), so one rate serves both."""
    adamw_learning_rate: float | None = None
    """A rate of its own for AdamW's parameters; None uses ``learning_rate``."""
    indexer_learning_rate: float | None = None
    """A rate of its own for the indexers, which learn from another loss; None treats them like the rest."""
    weight_decay: float = 0.1
    momentum: float = 0.95
    rms: float = 0.18
    ns_dtype: Literal["float32", "bfloat16"] = "float32"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-20

    def __post_init__(self) -> None:
        for name in ("learning_rate", "adamw_learning_rate", "indexer_learning_rate", "rms", "eps"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"train.optimizer.{name}: must be positive, found {value}")
        for name, value in (("momentum", self.momentum), ("beta1", self.betas[0]), ("beta2", self.betas[1])):
            if not 0 <= value < 1:
                raise ConfigError(f"train.optimizer.{name}: must lie in [0, 1), found {value}")
        if self.weight_decay < 0:
            raise ConfigError(f"train.optimizer.weight_decay: must not be negative, found {self.weight_decay}")


def rule_for(name: str, parameter: Tensor, rule: str) -> str:
    """``muon`` or ``adamw`` for one parameter. 3-D stacks (experts, output groups) count as matrices, one by one."""
    if rule == "adamw" or parameter.dim() < 2 or min(parameter.shape[-2:]) < 2 or ADAMW_NAMES.search(name):
        return "adamw"
    return "muon"


class MuonAdamW(torch.optim.Optimizer):
    """Both rules over one list of parameters. Raises ConfigError when Muon is asked for and gets no matrix."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig):
        self.config = config
        groups: dict[tuple[str, float], dict[str, Any]] = {}
        for name, parameter in named_parameters:
            rule = rule_for(name, parameter, config.rule)
            rate = config.learning_rate if rule == "muon" else (config.adamw_learning_rate or config.learning_rate)
            if ".indexer." in name and config.indexer_learning_rate:
                rate = config.indexer_learning_rate
            key = (rule, rate)
            group = groups.setdefault(key, {"params": [], "names": [], "rule": rule, "lr": rate, "peak_lr": rate})
            group["params"].append(parameter)
            group["names"].append(name)
        if config.rule == "muon" and not any(rule == "muon" for rule, _ in groups):
            raise ConfigError("train.optimizer.rule: muon was asked for, but no parameter is a matrix it applies to")
        super().__init__(list(groups.values()), {})

    def table(self) -> list[tuple[str, str, str, int, float]]:
        """Rows (parameter role, rule, shape, numbers, learning rate); layers of one role are one row."""
        rows: dict[tuple, list[int]] = {}
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"]):
                role = re.sub(r"layers\.\d+\.", "layers.*.", name)
                key = (role, group["rule"], tuple(parameter.shape), group["peak_lr"])
                count = rows.setdefault(key, [0, 0])
                count[0] += 1
                count[1] += parameter.numel()
        return [
            (role, rule, f"{count} x {list(shape)}", numbers, rate)
            for (role, rule, shape, rate), (count, numbers) in rows.items()
        ]

    def muon_share(self) -> float:
        """Share of all trained numbers that Muon moves."""
        total = {"muon": 0, "adamw": 0}
        for group in self.param_groups:
            total[group["rule"]] += sum(p.numel() for p in group["params"])
        return total["muon"] / max(1, sum(total.values()))

    def set_lr_scale(self, scale: float) -> None:
        """Every group's rate becomes its peak times ``scale``."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * scale

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update. Parameters without a gradient are left alone, with their state."""
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            if group["rule"] == "muon":
                self._muon(moving, group["lr"])
            else:
                self._adamw(moving, group["lr"])

    def _muon(self, parameters: list[Tensor], lr: float) -> None:
        """Report algorithm 1: Nesterov momentum, orthogonalisation, RMS-matched step with decoupled decay."""
        config = self.config
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for p in parameters:
            by_shape.setdefault((p.shape[-2], p.shape[-1]), []).append(p)
        for (rows, columns), group in by_shape.items():
            gradients = [p.grad for p in group if p.grad is not None]
            momenta = [self._state(p, "momentum") for p in group]
            torch._foreach_mul_(momenta, config.momentum)
            torch._foreach_add_(momenta, gradients)
            looked_ahead = torch._foreach_add(gradients, momenta, alpha=config.momentum)
            # Same-shape matrices of all layers and experts go through one batched iteration.
            counts = [p.numel() // (rows * columns) for p in group]
            batch = torch.cat([u.reshape(-1, rows, columns) for u in looked_ahead])
            updates = newton_schulz(batch, V4_COEFFICIENTS, getattr(torch, config.ns_dtype)).split(counts)
            torch._foreach_mul_(group, 1 - lr * config.weight_decay)
            scaled = [u.view_as(p) for u, p in zip(updates, group)]
            torch._foreach_add_(group, scaled, alpha=-lr * config.rms * math.sqrt(max(rows, columns)))

    def _adamw(self, parameters: list[Tensor], lr: float) -> None:
        if not parameters:
            return
        config = self.config
        beta1, beta2 = config.betas
        gradients = [p.grad for p in parameters if p.grad is not None]
        first = [self._state(p, "exp_avg") for p in parameters]
        second = [self._state(p, "exp_avg_sq") for p in parameters]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        # Decay is for maps: one-dimensional parameters (norm weights, biases, gates) have none to shrink towards.
        torch._foreach_mul_([p for p in parameters if p.dim() > 1], 1 - lr * config.weight_decay)
        for p, m, v in zip(parameters, first, second):
            steps = self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
            scale = math.sqrt(1 - beta2**steps) / (1 - beta1**steps)
            p.addcdiv_(m, v.sqrt().add_(config.eps), value=-lr * scale)

    def _state(self, p: Tensor, name: str) -> Tensor:
        state = self.state[p]
        if name not in state:
            state[name] = torch.zeros_like(p)
        return state[name]

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as ``<parameter>/<slot>`` tensors, ready for safetensors."""
        tensors = {}
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"]):
                for slot, value in self.state.get(p, {}).items():
                    tensors[f"{name}/{slot}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state_tensors`. Raises CheckpointError for a name or shape that does not fit."""
        parameters = {n: p for group in self.param_groups for n, p in zip(group["names"], group["params"])}
        for key, value in tensors.items():
            name, _, slot = key.rpartition("/")
            if name not in parameters:
                raise CheckpointError(f"optimizer state: '{name}' is not a parameter of this model")
            p = parameters[name]
            if slot == "steps":
                self.state[p][slot] = int(value)
                continue
            if value.shape != p.shape:
                raise CheckpointError(
                    f"optimizer state: '{key}' has shape {list(value.shape)}, its parameter {list(p.shape)}"
                )
            self.state[p][slot] = value.to(p.device, p.dtype).clone()
