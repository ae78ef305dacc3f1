"""The optimizer: Muon for matrices and AdamW for all other parameters."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.newton_schulz import STEPS_PER_GRAM_MATRIX, count_multiplications, newton_schulz
from model.batching import split_by_size
from model.distributed.dtensor import is_sharded, range_of, to_local
from model.errors import CheckpointError, ConfigError
from model.optim.config import OptimizerConfig
from model.optim.exchange import Exchange, Matrix

ADAMW_NAMES = re.compile(
    r"(^|\.)(embed|head|norm|attn_norm|ffn_norm|q_norm|kv_norm|\w*conv)\.|\.(base|scale|sink|ape)$|(^|\.)hyper_head\."
)
"""Parameters under AdamW by role (report 2.4): embedding, head, norms, mHC biases and gates. The report does not
mention sink logits (1-D) and the compressors' position biases, which are tables of biases, not linear maps, nor the
short convolutions of recurrent mixers, whose filters belong to one channel each."""
UNDECAYED_NAMES = re.compile(r"\.\w*conv\.")
"""Parameters under AdamW without weight decay, besides all one-dimensional ones."""


LocalTensors = tuple[Tensor, Tensor, Tensor]
"""This rank's rows of a weight, its gradient and its momentum, [..., rows, columns] each."""
_MAX_BATCH_ELEMENTS = 1 << 21
"""Elements orthogonalized in one batch."""


def _clamp(value: int, upper: int) -> int:
    return min(max(value, 0), upper)


def _idle_matrices(gradient: Tensor) -> Tensor | None:
    """Return which matrices of a stack [..., rows, columns] have a gradient of zero, bool [...]. None if there are
    none, or if the matrix is not part of a stack."""
    if gradient.dim() < 3:
        return None
    idle = ~gradient.any(-1).any(-1)
    return idle if idle.any() else None


def rule_for(name: str, parameter: Tensor, rule: str, rows: Sequence[int] = ()) -> str:
    """Return ``muon`` or ``adamw`` for a parameter. A 3-D stack (experts, output groups) counts as separate matrices,
    and so do the projections with ``rows`` rows each of a fused projection."""
    degenerate = parameter.dim() < 2 or min(*parameter.shape[-2:], *rows) < 2
    return "adamw" if rule == "adamw" or degenerate or ADAMW_NAMES.search(name) else "muon"


class MuonAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for all other parameters. Raises ConfigError if the rule is Muon and no parameter
    is a matrix.

    ``split_sizes`` maps parameters that stack several independent projections to the rows of each
    (:meth:`model.transformer.Transformer.split_sizes`). Muon treats each projection as a separate matrix.

    With ``distributed``, the ranks of the default process group divide Muon's work: one rank orthogonalizes each matrix
    that several ranks hold (:mod:`model.optim.exchange`). Every rank must create this optimizer and call ``step`` in
    the same order. A parameter that is not sharded must have equal gradients on all ranks, or none on all ranks.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        split_sizes: Mapping[str, Sequence[int]] | None = None,
        distributed: bool = False,
    ):
        self._rows: dict[Tensor, Sequence[int]] = {}
        self._decayed: set[Tensor] = set()
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in named_parameters:
            rows = (split_sizes or {}).get(name, parameter.shape[-2:-1])
            self._rows[parameter] = rows
            rule = rule_for(name, parameter, config.rule, rows)
            if parameter.dim() > 1 and not UNDECAYED_NAMES.search(name):
                self._decayed.add(parameter)
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
        """Indices of a parameter's matrices in the exchange, in order."""
        self._exchange = self._build_exchange() if distributed else None

    def _muon_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups if group["rule"] == "muon" for p in group["params"]]

    def _costs(self, p: Tensor) -> list[float]:
        """Return the multiply-adds of orthogonalizing each projection of a parameter, or of one matrix of a stack."""
        steps, segment = len(self.config.ns_coefficients), STEPS_PER_GRAM_MATRIX[getattr(torch, self.config.ns_dtype)]
        sizes = [(rows, p.shape[-1]) for rows in self._rows[p]]
        return [count_multiplications(min(size), max(size), steps, segment) for size in sizes]

    def _build_exchange(self) -> Exchange:
        """Return the exchange of the matrices that several ranks hold. A sharded 3-D stack is split between matrices:
        each stays on one rank and only adds to that rank's load."""
        world, dtype = dist.get_world_size(), getattr(torch, self.config.ns_dtype)
        matrices: list[Matrix] = []
        loads = [0.0] * world
        parameters = self._muon_parameters()
        for p in parameters:
            columns, rows, costs = p.shape[-1], self._rows[p], self._costs(p)
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
                    held = tuple((_clamp(s.begin - begin, count), _clamp(s.end - begin, count)) for s in spans)
                self._shared[p].append(len(matrices))
                matrices.append(Matrix(count, columns, held, cost))
                begin += count
        return Exchange(matrices, loads, dtype, to_local(parameters[0]).device if parameters else torch.device("cpu"))

    def table(self, layers: Sequence[str] = ()) -> list[tuple[str, str, str, int, float]]:
        """Return rows of (parameter role, rule, matrices, elements, learning rate), one per role over all layers.

        ``layers`` are the mixers of the layers. A role with several rows names the mixers of each row.
        """
        rows: dict[tuple, list[int]] = {}
        mixers: dict[tuple, dict[str, None]] = {}
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"]):
                role = re.sub(r"layers\.\d+\.", "layers.*.", name)
                key = (role, group["rule"], self._format_shape(parameter, group["rule"]), group["peak_lr"])
                count = rows.setdefault(key, [0, 0])
                count[0] += 1
                count[1] += parameter.numel()
                if (layer := re.search(r"layers\.(\d+)\.", name)) and int(layer[1]) < len(layers):
                    mixers.setdefault(key, {})[layers[int(layer[1])]] = None
        repeated = {role for role, count in Counter(role for role, *_ in rows).items() if count > 1}
        return [
            (
                f"{key[0]} ({', '.join(mixers[key])})" if key[0] in repeated and key in mixers else key[0],
                key[1],
                f"{count} x {key[2]}",
                elements,
                key[3],
            )
            for key, (count, elements) in rows.items()
        ]

    def _format_shape(self, parameter: Tensor, rule: str) -> str:
        """Format a parameter's shape or, under Muon, the matrices it is split into."""
        stack, parts = math.prod(parameter.shape[:-2]), Counter(self._rows[parameter])
        if rule == "adamw" or stack * parts.total() == 1:
            return str(list(parameter.shape))
        columns = parameter.shape[-1]
        each = " + ".join(f"{stack * count} x [{rows}, {columns}]" for rows, count in parts.items())
        return f"({each})"

    def multiplications(self) -> float:
        """Return the multiply-adds of orthogonalizing all matrices once, in their data type of this machine."""
        return sum(math.prod(p.shape[:-2]) * sum(self._costs(p)) for p in self._muon_parameters())

    def muon_share(self) -> float:
        """Return the share of all trained elements that Muon updates."""
        total = {"muon": 0, "adamw": 0}
        for group in self.param_groups:
            total[group["rule"]] += sum(p.numel() for p in group["params"])
        return total["muon"] / max(1, sum(total.values()))

    def set_rates(self, scale: float, indexer_peak: float | None = None) -> None:
        """Set every group's learning rate to ``scale`` times its peak. ``indexer_peak`` replaces the indexers' peak."""
        for group in self.param_groups:
            peak = indexer_peak if indexer_peak is not None and group["indexer"] else group["peak_lr"]
            group["lr"] = peak * scale

    def rates(self) -> dict[str, float]:
        """Return the current learning rates of ``muon``, ``adamw`` and the ``indexer``'s matrices."""
        shown = [group for group in self.param_groups if not group["indexer"] or group["rule"] == self.config.rule]
        return {"indexer" if group["indexer"] else group["rule"]: group["lr"] for group in shown}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["rule"] == "muon":
                self._muon(parameters, group["lr"])
            else:
                self._adamw(parameters, group["lr"])

    def _muon(self, parameters: list[Tensor], lr: float) -> None:
        """Apply Nesterov momentum, orthogonalization and an RMS-matched step with decoupled decay (report algorithm 1).

        Unlike there, a matrix of a stack whose gradient is zero, an expert without tokens, keeps its weights while its
        momentum decays. Orthogonalization would turn any remainder of the momentum into a step of full size.

        Matrices of one shape are batched over layers and experts. A batch fits the processor's cache.
        """
        by_shape: dict[tuple[int, int], list[LocalTensors]] = {}
        for p in parameters:
            if p in self._shared or not to_local(p).numel():
                continue
            parts = (t.split(list(self._rows[p]), dim=-2) for t in self._local_tensors(p))
            for rows, weight, gradient, momentum in zip(self._rows[p], *parts):
                by_shape.setdefault((rows, p.shape[-1]), []).append((weight, gradient, momentum))
        for (rows, columns), pieces in by_shape.items():
            for batch in split_by_size([weight.numel() for weight, _, _ in pieces], _MAX_BATCH_ELEMENTS):
                self._muon_batch(pieces[batch], rows, columns, lr)
        if self._exchange is not None:
            self._muon_distributed(self._exchange, [p for p in parameters if p in self._shared], lr)

    def _local_tensors(self, p: Tensor) -> LocalTensors:
        """Return this rank's rows of a parameter that has a gradient."""
        assert p.grad is not None
        return to_local(p), to_local(p.grad), self._state(p, "momentum")

    def _muon_distributed(self, exchange: Exchange, parameters: list[Tensor], lr: float) -> None:
        """Apply Muon to matrices that several ranks hold: orthogonalize the matrices assigned to this rank, and update
        this rank's rows of all of them."""
        local: dict[int, LocalTensors] = {}
        chosen: list[int] = []
        for p in parameters:
            weight, gradient, momentum = self._local_tensors(p)
            columns = weight.shape[-1]
            weight, momentum = (
                weight.view(-1, columns),
                momentum.view(-1, columns),
            )  # views, because both are updated in place
            gradient = gradient.reshape(-1, columns)
            torch.add(gradient, momentum, alpha=self.config.momentum, out=momentum)
            counts = [exchange.matrices[i].shape_on(exchange.rank)[0] for i in self._shared[p]]
            for i, *piece in zip(self._shared[p], *(t.split(counts) for t in (weight, gradient, momentum))):
                local[i] = (piece[0], piece[1], piece[2])
                if p.dim() == 2 or piece[1].any():  # all ranks hold the matrices of a stack in full, and agree
                    chosen.append(i)

        def read(i: int) -> Tensor:
            _, gradient, momentum = local[i]
            return torch.add(gradient, momentum, alpha=self.config.momentum).to(exchange.dtype)

        def write(i: int, update: Tensor) -> None:
            matrix = exchange.matrices[i]
            self._apply_update(local[i][0], update, matrix.rows, matrix.columns, lr)

        exchange.orthogonalize(chosen, read, self._orthogonalize, write)

    def _orthogonalize(self, matrices: list[Tensor]) -> list[Tensor]:
        """Orthogonalize matrices [rows, columns] of any shapes, with matrices of one shape in batches."""
        by_shape: dict[torch.Size, list[int]] = {}
        for i, matrix in enumerate(matrices):
            by_shape.setdefault(matrix.shape, []).append(i)
        found: dict[int, Tensor] = {}
        for indices in by_shape.values():
            for batch in split_by_size([matrices[i].numel() for i in indices], _MAX_BATCH_ELEMENTS):
                stack = torch.stack([matrices[i] for i in indices[batch]])
                found.update(zip(indices[batch], newton_schulz(stack, self.config.ns_coefficients, stack.dtype)))
        return [found[i] for i in range(len(matrices))]

    def _apply_update(self, weight: Tensor, update: Tensor, rows: int, columns: int, lr: float) -> None:
        """Decay ``weight``, all or some rows of matrices [rows, columns], and subtract the scaled update."""
        size = lr * self.config.rms * math.sqrt(max(rows, columns))
        weight.mul_(1 - lr * self.config.weight_decay).add_(update.reshape(weight.shape), alpha=-size)

    def _muon_batch(self, batch: list[LocalTensors], rows: int, columns: int, lr: float) -> None:
        config = self.config
        counts = [weight.numel() // (rows * columns) for weight, _, _ in batch]
        dtype = getattr(torch, config.ns_dtype)
        ahead = torch.empty(sum(counts), rows, columns, dtype=dtype, device=batch[0][0].device)
        for (_, gradient, momentum), out in zip(batch, ahead.split(counts)):
            torch.add(gradient, momentum, alpha=config.momentum, out=momentum)
            torch.add(gradient, momentum, alpha=config.momentum, out=out.view(gradient.shape))
        updates = newton_schulz(ahead, config.ns_coefficients, dtype).split(counts)
        for (weight, gradient, _), update in zip(batch, updates):
            idle = _idle_matrices(gradient)
            if idle is None:
                self._apply_update(weight, update, rows, columns, lr)
            else:
                kept = weight[idle]
                self._apply_update(weight, update, rows, columns, lr)
                weight[idle] = kept

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
        # One-dimensional parameters (norm weights, biases, gates) and short filters do not decay.
        maps = [to_local(p) for p in parameters if p in self._decayed]
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
        """Return the state as tensors named ``<parameter>/<slot>``, with this rank's rows of sharded parameters."""
        tensors = {}
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"]):
                for slot, value in self.state.get(p, {}).items():
                    tensors[f"{name}/{slot}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Replace the state by that of :meth:`state_tensors`. Raises CheckpointError and changes nothing if a name or
        shape does not fit."""
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
