"""The optimizer: Muon for matrices, AdamW for the rest, behind one step, one state and one printed table."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.newton_schulz import STEPS_PER_GRAM_MATRIX, count_multiplications, newton_schulz
from model.distributed.dtensor import is_sharded, range_of, to_local
from model.errors import CheckpointError, ConfigError
from model.optim.config import OptimizerConfig
from model.optim.exchange import Exchange, Matrix

ADAMW_NAMES = re.compile(
    r"(^|\.)(embed|head|norm|attn_norm|ffn_norm|q_norm|kv_norm)\.|\.(base|scale|sink|ape)$|(^|\.)hyper_head\."
)
"""AdamW by role (report 2.4): embedding, head, norms, mHC biases and gates. Ours to decide: sink logits (1-D) and the
compressors' position biases, which are bias tables and not maps, whatever their shape."""


Matrices = tuple[Tensor, Tensor, Tensor]
"""Weights, their gradients and their momenta, [..., rows, columns] each."""
_BATCH = 1 << 21
"""Numbers that are orthogonalised together."""


def _batches(sizes: Iterable[int]) -> Iterator[slice]:
    """Of pieces with so many numbers, consecutive ones with at most ``_BATCH`` together, or single larger ones."""
    begin = end = numbers = 0
    for end, size in enumerate(sizes):
        if end > begin and numbers + size > _BATCH:
            yield slice(begin, end)
            begin, numbers = end, 0
        numbers += size
    yield slice(begin, end + 1)


def _within(place: int, count: int) -> int:
    return min(max(place, 0), count)


def rule_for(name: str, parameter: Tensor, rule: str, rows: Sequence[int] = ()) -> str:
    """``muon`` or ``adamw`` for one parameter. 3-D stacks (experts, output groups) count as matrices, one by one, and
    so do the ``rows`` of each part of a fused projection."""
    degenerate = parameter.dim() < 2 or min(*parameter.shape[-2:], *rows) < 2
    return "adamw" if rule == "adamw" or degenerate or ADAMW_NAMES.search(name) else "muon"


class MuonAdamW(torch.optim.Optimizer):
    """Both rules over one list of parameters. Raises ConfigError when Muon is asked for and gets no matrix.

    ``fused`` names the parameters that hold several independent projections, one above the other, and the rows of each
    (:meth:`model.transformer.Transformer.fused_rows`): Muon treats them as matrices of their own.

    ``divided`` is for the ranks of the default process group, each of which has such an optimizer and calls ``step``
    with it: a matrix that several of them hold is orthogonalised by one (:mod:`model.optim.exchange`). Parameters that
    are not sharded must have the same gradient on every rank, or on every rank none.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        fused: Mapping[str, Sequence[int]] | None = None,
        divided: bool = False,
    ):
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
            raise ConfigError("optimizer rule 'muon': no parameter is a matrix that it applies to")
        super().__init__(list(groups.values()), {})
        self.config = config.on(self.param_groups[0]["params"][0].device)
        self._shared: dict[Tensor, list[int]] = {}
        """The numbers of a parameter's matrices in the exchange, in their order."""
        self._exchange = self._divide() if divided else None

    def _divide(self) -> Exchange:
        """Which matrices the ranks have in common. Whole ones of a sharded stack are their holder's alone."""
        world, dtype = dist.get_world_size(), getattr(torch, self.config.ns_dtype)
        steps = len(self.config.ns_coefficients)
        matrices: list[Matrix] = []
        loads = [0.0] * world
        parameters = [p for group in self.param_groups if group["rule"] == "muon" for p in group["params"]]
        for p in parameters:
            columns, rows = p.shape[-1], self._rows[p]
            segment = STEPS_PER_GRAM_MATRIX[dtype]
            costs = [count_multiplications(min(r, columns), max(r, columns), steps, segment) for r in rows]
            spans = [range_of(p.shape[0], rank, world) for rank in range(world)]
            if is_sharded(p) and p.dim() > 2:
                each = sum(costs) * math.prod(p.shape[1:-2])
                loads = [load + each * (span.end - span.begin) for load, span in zip(loads, spans)]
                continue
            self._shared[p] = []
            begin = 0
            for count, cost in list(zip(rows, costs)) * math.prod(p.shape[:-2]):
                held = tuple((0, count) for _ in spans)
                if is_sharded(p):
                    held = tuple((_within(s.begin - begin, count), _within(s.end - begin, count)) for s in spans)
                self._shared[p].append(len(matrices))
                matrices.append(Matrix(count, columns, held, cost))
                begin += count
        return Exchange(matrices, loads, dtype, to_local(parameters[0]).device if parameters else torch.device("cpu"))

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
        """The present learning rates: of ``muon``, ``adamw`` and the ``indexer``'s matrices."""
        shown = [group for group in self.param_groups if not group["indexer"] or group["rule"] == self.config.rule]
        return {"indexer" if group["indexer"] else group["rule"]: group["lr"] for group in shown}

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
            if p in self._shared or not to_local(p).numel():
                continue
            parts = (t.split(list(self._rows[p]), dim=-2) for t in self._moved(p))
            for rows, weight, gradient, momentum in zip(self._rows[p], *parts):
                by_shape.setdefault((rows, p.shape[-1]), []).append((weight, gradient, momentum))
        for (rows, columns), pieces in by_shape.items():
            for batch in _batches(weight.numel() for weight, _, _ in pieces):
                self._muon_batch(pieces[batch], rows, columns, lr)
        if self._exchange is not None:
            self._muon_divided(self._exchange, [p for p in parameters if p in self._shared], lr)

    def _moved(self, p: Tensor) -> Matrices:
        """This rank's rows of a parameter that has a gradient."""
        assert p.grad is not None
        return to_local(p), to_local(p.grad), self._state(p, "momentum")

    def _muon_divided(self, exchange: Exchange, parameters: list[Tensor], lr: float) -> None:
        """The same for matrices that ranks have in common: this rank's share of the work, and its rows of the rest."""
        mine: dict[int, Matrices] = {}
        for p in parameters:
            weight, gradient, momentum = self._moved(p)
            columns = weight.shape[-1]
            weight, momentum = weight.view(-1, columns), momentum.view(-1, columns)  # written to, so never copies
            gradient = gradient.reshape(-1, columns)
            torch.add(gradient, momentum, alpha=self.config.momentum, out=momentum)
            counts = [exchange.matrices[i].shape_on(exchange.rank)[0] for i in self._shared[p]]
            pieces = zip(weight.split(counts), gradient.split(counts), momentum.split(counts))
            mine.update(zip(self._shared[p], pieces))

        def read(i: int) -> Tensor:
            _, gradient, momentum = mine[i]
            return torch.add(gradient, momentum, alpha=self.config.momentum).to(exchange.dtype)

        def write(i: int, update: Tensor) -> None:
            matrix = exchange.matrices[i]
            self._descend(mine[i][0], update, matrix.rows, matrix.columns, lr)

        exchange.orthogonalise(list(mine), read, self._orthogonalised, write)

    def _orthogonalised(self, matrices: list[Tensor]) -> list[Tensor]:
        """Matrices [rows, columns] of any shapes; those of one shape in batches."""
        by_shape: dict[torch.Size, list[int]] = {}
        for i, matrix in enumerate(matrices):
            by_shape.setdefault(matrix.shape, []).append(i)
        found: dict[int, Tensor] = {}
        for alike in by_shape.values():
            for batch in _batches(matrices[i].numel() for i in alike):
                stack = torch.stack([matrices[i] for i in alike[batch]])
                found.update(zip(alike[batch], newton_schulz(stack, self.config.ns_coefficients, stack.dtype)))
        return [found[i] for i in range(len(matrices))]

    def _descend(self, weight: Tensor, update: Tensor, rows: int, columns: int, lr: float) -> None:
        """A step along the update of matrices [rows, columns], whatever rows of them ``weight`` holds."""
        size = lr * self.config.rms * math.sqrt(max(rows, columns))
        weight.mul_(1 - lr * self.config.weight_decay).add_(update.reshape(weight.shape), alpha=-size)

    def _muon_batch(self, batch: list[Matrices], rows: int, columns: int, lr: float) -> None:
        config = self.config
        counts = [weight.numel() // (rows * columns) for weight, _, _ in batch]
        dtype = getattr(torch, config.ns_dtype)
        ahead = torch.empty(sum(counts), rows, columns, dtype=dtype, device=batch[0][0].device)
        for (_, gradient, momentum), out in zip(batch, ahead.split(counts)):
            torch.add(gradient, momentum, alpha=config.momentum, out=momentum)
            torch.add(gradient, momentum, alpha=config.momentum, out=out.view(gradient.shape))
        updates = newton_schulz(ahead, config.ns_coefficients, dtype).split(counts)
        for (weight, _, _), update in zip(batch, updates):
            self._descend(weight, update, rows, columns, lr)

    def _adamw(self, parameters: list[Tensor], lr: float) -> None:
        if not parameters:
            return
        config = self.config
        beta1, beta2 = config.betas
        gradients = [to_local(p.grad) for p in parameters if p.grad is not None]
        first = [self._state(p, "exp_avg") for p in parameters]
        second = [self._state(p, "exp_avg_sq") for p in parameters]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        # Decay is for maps: one-dimensional parameters (norm weights, biases, gates) have none to shrink towards.
        maps = [to_local(p) for p in parameters if p.dim() > 1]
        if maps:
            torch._foreach_mul_(maps, 1 - lr * config.weight_decay)
        for p, m, v in zip(parameters, first, second):
            steps = self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
            scale = math.sqrt(1 - beta2**steps) / (1 - beta1**steps)
            to_local(p).addcdiv_(m, v.sqrt().add_(config.eps), value=-lr * scale)

    def _state(self, p: Tensor, name: str) -> Tensor:
        state = self.state[p]
        if name not in state:
            state[name] = torch.zeros_like(to_local(p))
        return state[name]

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as ``<parameter>/<slot>`` tensors for safetensors; of sharded parameters, this rank's rows."""
        tensors = {}
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"]):
                for slot, value in self.state.get(p, {}).items():
                    tensors[f"{name}/{slot}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state_tensors`: what was there is gone. Raises CheckpointError, and changes nothing, for a
        name or shape that does not fit."""
        loaded: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        parameters = {n: p for group in self.param_groups for n, p in zip(group["names"], group["params"])}
        for key, value in tensors.items():
            name, _, slot = key.rpartition("/")
            if name not in parameters:
                raise CheckpointError(f"optimizer state: '{name}' is not a parameter of this model")
            p = parameters[name]
            if slot == "steps":
                loaded[p][slot] = int(value)
                continue
            held = to_local(p)
            if value.shape != held.shape:
                raise CheckpointError(
                    f"optimizer state: '{key}' has shape {list(value.shape)}, its parameter {list(held.shape)}"
                )
            loaded[p][slot] = value.to(held.device, held.dtype).clone()
        self.state.clear()
        self.state.update(loaded)
