"""The checkpoint families."""

from __future__ import annotations

from model.config import ModelConfig
from model.errors import ConfigError
from model.hf.config_reader import ConfigReader
from model.hf.deepseek_v4 import DeepseekV4
from model.hf.deepseek_v32 import DeepseekV32
from model.hf.family import Family
from model.hf.kimi_linear import KimiLinear
from model.hf.mamba2 import Mamba2

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (DeepseekV4(), DeepseekV32(), Mamba2(), KimiLinear())
}
"""Families by ``model_type``."""


def family_of_file(r: ConfigReader) -> Family:
    """Return the family of a config.json. Raises CheckpointError."""
    name = r.content.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise r.wrong("model_type", f"one of {', '.join(FAMILIES)}", name)
    return FAMILIES[name]


def family_of_network(config: ModelConfig) -> Family:
    """Return the family that has the mixers of a network. Raises ConfigError."""
    for family in FAMILIES.values():
        if set(config.layers) <= set(family.mixers.values()):
            return family
    known = "; ".join(f"{family.title} ({', '.join(family.mixers.values())})" for family in FAMILIES.values())
    kinds = [*dict.fromkeys(config.layers)]
    found = kinds[0] if len(kinds) == 1 else f"{', '.join(kinds)} together"
    raise ConfigError(f"layers: no checkpoint format has layers of {found}; there are {known}")
