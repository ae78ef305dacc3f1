"""Rotary settings in a ``config.json``: flat ``rope_parameters``, or the older ``rope_theta`` and ``rope_scaling``."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.hf.config_reader import ConfigReader


def flat_theta(r: ConfigReader, key: str = "rope_theta") -> float:
    """Return a rotary base from the top level or from flat ``rope_parameters``, which must agree."""
    rope = r.mapping("rope_parameters")
    if rope.get(key) is None:
        if not r.has(key):
            raise r.error(f"key '{key}' is missing, at the top level and in 'rope_parameters'")
        return r.number(key)
    inner = r.number(key, rope, "rope_parameters.")
    if r.has(key) and r.number(key) != inner:
        raise r.wrong(f"rope_parameters.{key}", f"{r.number(key)} as in '{key}'", inner)
    return inner


def flat_scaling(r: ConfigReader) -> tuple[dict[str, Any], str]:
    """Return the mapping that describes the scaling of rotations, and the prefix of its keys in messages."""
    scaling = r.mapping("rope_scaling")
    return (scaling, "rope_scaling.") if scaling else (r.mapping("rope_parameters"), "rope_parameters.")


def read_yarn(r: ConfigReader, scaling: dict[str, Any], inside: str) -> dict[str, Any]:
    """Return the YaRN fields of a mapping whose keys have the prefix ``inside``; none without scaling."""
    key = "rope_type" if "rope_type" in scaling else "type"
    kind = scaling.get(key, "default")
    if kind == "default":
        return {}
    if kind != "yarn":
        raise r.wrong(f"{inside}{key}", '"default" or "yarn"', kind)
    if scaling.get("truncate", True) is not True:
        raise r.wrong(f"{inside}truncate", "true", scaling["truncate"])
    original = scaling.get("original_max_position_embeddings")
    if type(original) is not int:
        raise r.wrong(f"{inside}original_max_position_embeddings", "a whole number", original)
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, **scaling}
    return {
        "yarn_factor": r.number("factor", scaling, inside),
        "yarn_original_positions": original,
        "yarn_beta_fast": r.number("beta_fast", defaults, inside),
        "yarn_beta_slow": r.number("beta_slow", defaults, inside),
    }


def write_yarn(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of YaRN, without its type; none without scaling."""
    c = config
    if c.yarn_factor == 1:
        return {}
    return {
        "factor": c.yarn_factor,
        "original_max_position_embeddings": c.yarn_original_positions,
        "beta_fast": c.yarn_beta_fast,
        "beta_slow": c.yarn_beta_slow,
    }
