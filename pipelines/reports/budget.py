"""The closed-form costs of a model, beside references and without each of the five choices."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig
from model.costs import (
    FP8_EQUIVALENT,
    PARAMETER_RULE,
    WEIGHTING,
    Ablation,
    CostModel,
    Crossover,
    ParameterCount,
    Step,
    costs_of,
    count_parameters,
    find_ablations,
    find_crossovers,
    gqa8_costs,
    times,
    v32_costs,
    waterfall,
)
from model.optim import rule_for
from model.transformer import Transformer
from pipelines.reports.cache_measurement import Measurement


@dataclass(frozen=True)
class Budget:
    """All results of the step; :meth:`to_dict` returns them as plain values."""

    config: ModelConfig
    context: int
    parameters: ParameterCount
    own: CostModel
    references: tuple[CostModel, ...]
    """V3.2 and GQA-8, without one that is the model itself."""
    ablations: tuple[Ablation, ...]
    waterfall: tuple[Step, ...]
    crossovers: tuple[Crossover, ...]
    measurement: Measurement | None = None
    """Measurement of the model's own cache at ``context`` tokens, with ``--measure``."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, each with its rule. Ratios are null where the model's own cost is zero."""
        parameters = {
            "rule": PARAMETER_RULE,
            "total": self.parameters.total,
            "active": self.parameters.active,
            "multi_token_module": self.parameters.mtp,
            "components": {
                name: {"total": total, "active": active} for name, (total, active) in self.parameters.components.items()
            },
        }
        without = [
            {
                "choice": choice.name,
                "taken_away": choice.taken_away,
                "used": choice.used,
                **self._costs(choice.costs),
                "changes": [dataclasses.asdict(change) for change in choice.changes],
            }
            for choice in self.ablations
        ]
        return {
            "model": {"name": self.own.name, "config": self.config.to_dict()},
            "context": self.context,
            "weighting": {"rule": WEIGHTING, "fp8_equivalent": FP8_EQUIVALENT},
            "parameters": parameters,
            "own": self._costs(self.own),
            "references": [self._costs(account) for account in self.references],
            "without": without,
            "waterfall": [dataclasses.asdict(step) for step in self.waterfall],
            "regimes": [dataclasses.asdict(regime) for regime in self.crossovers],
            "measured": None if self.measurement is None else self.measurement.to_dict(),
        }

    def _costs(self, account: CostModel) -> dict[str, Any]:
        work, n = account.work(self.context), self.context
        return {
            "name": account.name,
            "rule": account.rule,
            "cache_bytes_per_token": account.bytes_per_token,
            "cache_bytes_per_token_by_component": account.per_token,
            "fixed_state_bytes": account.fixed,
            "cache_bytes": account.cache_bytes(n),
            "decode_flops": account.flops(n),
            "decode_fp8_equivalent": account.equivalent(n),
            "decode_work": [{**dataclasses.asdict(part), "fp8_equivalent": part.equivalent} for part in work],
            "times_own": {
                "cache_bytes_per_token": times(account.bytes_per_token, self.own.bytes_per_token),
                "cache_bytes": times(account.cache_bytes(n), self.own.cache_bytes(n)),
                "decode_flops": times(account.flops(n), self.own.flops(n)),
                "decode_fp8_equivalent": times(account.equivalent(n), self.own.equivalent(n)),
            },
        }


def budget_of(config: ModelConfig, context: int, name: str = "model", muon: bool = True) -> Budget:
    """Return the budget of ``config`` at ``context`` tokens.

    The network is built on the meta device, where tensors have shapes but no memory.

    Args:
        muon: Whether the recipe trains with Muon.
    """
    model = Transformer.on_meta(config)
    muon_parameters = sum(p.numel() for n, p in model.named_parameters() if rule_for(n, p, "muon") == "muon")
    parameters = count_parameters(model)
    own = costs_of(config, name)
    references = tuple(other for other in (v32_costs(), gqa8_costs(config)) if not own.equals(other, context))
    return Budget(
        config,
        context,
        parameters,
        own,
        references,
        find_ablations(config, parameters, muon_parameters, muon),
        waterfall(config, muon),
        find_crossovers(config, references),
    )
