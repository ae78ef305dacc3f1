"""Costs of published families at the width, number of layers and number of heads of a model."""

from __future__ import annotations

import dataclasses

from model.config import ModelConfig
from model.costs.references import CostModel, costs_of
from model.depth import FAMILIES
from model.errors import ConfigError
from model.wording import count
from model.work import Work

COMPARED = tuple(name for name, family in FAMILIES.items() if family.mixers is not None)
"""Families whose mixers follow from a width, a number of layers and a number of heads."""
SSA_DENSITY = 1 / 64.5
"""Subquadratic reports 64.5 times less compute than dense attention at a million tokens for its SSA (SubQ 1.1, June
2026)."""


def family_config(config: ModelConfig, name: str) -> ModelConfig:
    """Return ``config`` with the mixers of the family ``name`` (:data:`model.depth.FAMILIES`) in every layer.

    Width, number of layers, number of heads, feed-forward, vocabulary and head stay. Residuals are plain and experts
    unquantized, as the families publish them. Raises ConfigError.
    """
    mixers = FAMILIES[name].mixers if name in COMPARED else None
    if mixers is None:
        raise ConfigError(f"'{name}' is not one of {', '.join(COMPARED)}")
    values = mixers(config.hidden_size, config.num_layers, config.num_heads)
    return config.replace(hyper_connections=False, qat=False, mtp_layers=0, **values)


def family_costs(config: ModelConfig, name: str) -> CostModel:
    """Return the costs of :func:`family_config`. Raises ConfigError."""
    found = family_config(config, name)
    options = {
        mixer: ", ".join(f"{key} {value}" for key, value in values.items() if _is_size(key, value))
        for mixer, values in found.mixer_options.items()
    }
    sizes = "; ".join(f"{mixer}: {listed}" for mixer, listed in options.items() if listed)
    sizes = sizes or f"{count(found.num_kv_heads, 'key-value head')} of {found.head_dim} dims"
    shape = f"{count(found.num_layers, 'layer')}, {count(found.num_heads, 'head')}; {sizes}"
    rule = f"{shape}; the model's width and feed-forward, plain residuals"
    return dataclasses.replace(costs_of(found), name=FAMILIES[name].title, rule=rule)


def ssa_costs(config: ModelConfig, density: float = SSA_DENSITY) -> CostModel:
    """Return :func:`with_ssa` of grouped-query attention at the width, layers and heads of ``config``."""
    return with_ssa(family_costs(config, "gqa"), density)


def with_ssa(dense: CostModel, density: float = SSA_DENSITY) -> CostModel:
    """Return an assumption about Subquadratic's sparse attention (SSA), whose design is not published.

    The cache is the full one of ``dense``, a network with grouped-query attention. Core attention costs ``density``
    times as much as dense attention at every length, and the selection nothing.
    """

    def work(tokens: int) -> list[Work]:
        return [
            dataclasses.replace(part, flops=density * part.flops) if part.kind == "core" else part
            for part in dense.work(tokens)
        ]

    return dataclasses.replace(
        dense,
        name="SSA (assumption)",
        rule=f"assumption, not a published design: the full cache of GQA, core attention at {density:.4g} of its dense "
        "cost at every length, selection free",
        work=work,
    )


def _is_size(key: str, value: object) -> bool:
    return type(value) is int and key != "chunk_size"  # changes speed only
