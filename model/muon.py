"""The optimizer: Muon for matrices, AdamW for the rest, behind one step, one state and one printed table."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    ns_coefficients: tuple[tuple[float, float, float], ...] = V4_COEFFICIENTS
    """One (a, b, c) for each step of the iteration; V4's are 8 fast ones and 2 that settle."""
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
        if not self.ns_coefficients or not all(math.isfinite(x) for step in self.ns_coefficients for x in step):
            raise ConfigError(
                f"train.optimizer.ns_coefficients: expected at least one step of finite (a, b, c), "
                f"found {list(self.ns_coefficients)}"
            )
        if self.weight_decay < 0:
            raise ConfigError(f"train.optimizer.weight_decay: must not be negative, found {self.weight_decay}")


Matrices = tuple[Tensor, Tensor, Tensor]
"""Weights, their gradients and their momenta, [..., rows, columns] each."""
_BATCH = 1 << 21
"""Numbers that are orthogonalised together."""


def _batches(pieces: list[Matrices]) -> Iterator[list[Matrices]]:
    """Consecutive pieces of together at most ``_BATCH`` numbers, or single larger ones."""
    batch: list[Matrices] = []
    for piece in pieces:
        if batch and sum(p[0].numel() for p in batch) + piece[0].numel() > _BATCH:
            yield batch
            batch = []
        batch.append(piece)
    yield batch


def rule_for(name: str, parameter: Tensor, rule: str, rows: Sequence[int] = ()) -> str:
    """``muon`` or ``adamw`` for one parameter. 3-D stacks (experts, output groups) count as matrices, one by one, and
    so do the ``rows`` of each part of a fused projection."""
    degenerate = parameter.dim() < 2 or min(*parameter.shape[-2:], *rows) < 2
    return "adamw" if rule == "adamw" or degenerate or ADAMW_NAMES.search(name) else "muon"


class MuonAdamW(torch.optim.Optimizer):
    """Both rules over one list of parameters. Raises ConfigError when Muon is asked for and gets no matrix.

    ``fused`` names the parameters that hold several independent projections, one above the other, and the rows of each
    (:meth:`model.transformer.Transformer.fused_rows`): Muon treats them as matrices of their own.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        fused: Mapping[str, Sequence[int]] | None = None,
    ):
        self.config = config
        self._rows: dict[Tensor, Sequence[int]] = {}
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in named_parameters:
            rows = (fused or {}).get(name, parameter.shape[-2:-1])
            self._rows[parameter] = rows
            rule = rule_for(name, parameter, config.rule, rows)
            rate = config.learning_rate if rule == "muon" else (config.adamw_learning_rate or config.learning_rate)
            indexer = ".indexer." in name
            if indexer and config.indexer_learning_rate:
                rate = config.indexer_learning_rate
            new = {"params": [], "names": [], "rule": rule, "indexer": indexer, "lr": rate, "peak_lr": rate}
            group = groups.setdefault((rule, indexer), new)
            group["params"].append(parameter)
            group["names"].append(name)
        if config.rule == "muon" and not any(rule == "muon" for rule, _ in groups):
            raise ConfigError("train.optimizer.rule: muon was asked for, but no parameter is a matrix it applies to")
        super().__init__(list(groups.values()), {})

    def table(self) -> list[tuple[str, str, str, int, float]]:
        """Rows (parameter role, rule, matrices, numbers, learning rate); layers of one role are one row."""
        rows: dict[tuple, list[int]] = {}
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"]):
                role = re.sub(r"layers\.\d+\.", "layers.*.", name)
                key = (role, group["rule"], self._shown(parameter, group["rule"]), group["peak_lr"])
                count = rows.setdefault(key, [0, 0])
                count[0] += 1
                count[1] += parameter.numel()
        return [
            (role, rule, f"{count} x {shown}", numbers, rate)
            for (role, rule, shown, rate), (count, numbers) in rows.items()
        ]

    def _shown(self, parameter: Tensor, rule: str) -> str:
        """A parameter as what its rule takes for one: its shape, or the matrices it is split into."""
        stack, parts = math.prod(parameter.shape[:-2]), Counter(self._rows[parameter])
        if rule == "adamw" or stack * parts.total() == 1:
            return str(list(parameter.shape))
        columns = parameter.shape[-1]
        each = " + ".join(f"{stack * count} x [{rows}, {columns}]" for rows, count in parts.items())
        return f"({each})"

    def muon_share(self) -> float:
        """Share of all trained numbers that Muon moves."""
        total = {"muon": 0, "adamw": 0}
        for group in self.param_groups:
            total[group["rule"]] += sum(p.numel() for p in group["params"])
        return total["muon"] / max(1, sum(total.values()))

    def set_rates(self, scale: float, indexer_peak: float | None = None) -> None:
        """Every group's rate becomes its peak times ``scale``; the indexers' peak is ``indexer_peak`` where given."""
        for group in self.param_groups:
            peak = indexer_peak if indexer_peak is not None and group["indexer"] else group["peak_lr"]
            group["lr"] = peak * scale

    def rates(self) -> dict[str, float]:
        """The present learning rates: of ``muon``, ``adamw`` and, whatever their rule, the ``indexer`` parameters."""
        return {"indexer" if group["indexer"] else group["rule"]: group["lr"] for group in self.param_groups}

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
        """Report algorithm 1: Nesterov momentum, orthogonalisation, RMS-matched step with decoupled decay.

        Same-shape matrices of all layers and experts go through one iteration together, so many at a time that the
        passes over them stay in the processor's cache.
        """
        by_shape: dict[tuple[int, int], list[Matrices]] = {}
        for p in parameters:
            assert p.grad is not None
            whole = (p, p.grad, self._state(p, "momentum"))
            for rows, *part in zip(self._rows[p], *(t.split(list(self._rows[p]), dim=-2) for t in whole)):
                by_shape.setdefault((rows, p.shape[-1]), []).append((part[0], part[1], part[2]))
        for (rows, columns), pieces in by_shape.items():
            for batch in _batches(pieces):
                self._muon_batch(batch, rows, columns, lr)

    def _muon_batch(self, batch: list[Matrices], rows: int, columns: int, lr: float) -> None:
        config = self.config
        counts = [weight.numel() // (rows * columns) for weight, _, _ in batch]
        dtype = getattr(torch, config.ns_dtype)
        ahead = torch.empty(sum(counts), rows, columns, dtype=dtype, device=batch[0][0].device)
        for (_, gradient, momentum), out in zip(batch, ahead.split(counts)):
            torch.add(gradient, momentum, alpha=config.momentum, out=momentum)
            torch.add(gradient, momentum, alpha=config.momentum, out=out.view(gradient.shape))
        updates = newton_schulz(ahead, config.ns_coefficients, dtype).split(counts)
        size = lr * config.rms * math.sqrt(max(rows, columns))
        for (weight, _, _), update in zip(batch, updates):
            weight.mul_(1 - lr * config.weight_decay).add_(update.reshape(weight.shape), alpha=-size)

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
