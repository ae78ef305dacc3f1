"""The network's configuration: every number that fixes shapes, formats and the layer schedule.

Names follow DeepSeek-V4's release where it has one. Presets are in :data:`PRESETS`; any field can be overridden.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.errors import ConfigError

MIXER_NAMES = ("sliding", "csa", "hca", "gqa")
COMPRESSED_MIXERS = ("csa", "hca")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All hyper-parameters of one network. Immutable; derive variants with :meth:`replace`.

    The five choices of the V4 recipe are one switch each:

    1. hybrid attention: ``layers`` (``csa``/``hca``/``sliding`` against ``gqa``);
    2. cache precision: ``cache_precision`` (``mixed`` against ``bf16``);
    3. Muon: not here, ``train.optimizer.rule``;
    4. hyper-connections: ``hyper_connections``;
    5. quantisation-aware training: ``qat``.
    """

    # --- size
    vocab_size: int = 258
    hidden_size: int = 128
    layers: tuple[str, ...] = ("sliding", "csa", "hca", "csa")
    max_positions: int = 65_536
    norm_eps: float = 1e-6
    init_std: float = 0.02
    zero_init_output: bool = False
    """Start the last projection of every attention and feed-forward block at zero. The release says only
    "std 0.02"; at a few hundred steps a zero start learns sooner, so the tiny recipes choose it."""

    # --- attention, shared by sliding / csa / hca
    num_heads: int = 4
    head_dim: int = 64
    rope_head_dim: int = 16
    q_lora_rank: int = 64
    o_groups: int = 2
    o_lora_rank: int = 32
    window: int = 16
    """Raw tokens that every query sees, itself included."""
    rope_theta: float = 10_000.0
    """Sliding and gqa layers; no YaRN there."""
    compress_rope_theta: float = 160_000.0
    """Every rotation inside csa and hca layers (queries, window, entries, indexer)."""
    yarn_factor: float = 1.0
    """1 switches YaRN off. Applies to csa and hca layers only; the attention factor stays 1.0."""
    yarn_original_positions: int = 65_536
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0

    # --- compression
    csa_ratio: int = 4
    hca_ratio: int = 32
    index_heads: int = 4
    index_head_dim: int = 16
    index_topk: int = 8

    # --- gqa layers (the baseline)
    num_kv_heads: int = 2

    # --- residual stream
    hyper_connections: bool = True
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    hc_alpha_init: float = 0.01
    """Published (mHC paper, table 5)."""
    hc_comb_init: Literal["uniform", "identity"] = "uniform"
    """The mixing matrix at step 0. Unpublished. ``uniform`` is what a zero bias gives and starts as a plain
    residual on the streams' mean; ``identity`` keeps the streams apart."""

    # --- feed-forward
    ffn: Literal["moe", "dense"] = "moe"
    ffn_size: int = 256
    """Inner width of the dense feed-forward."""
    num_experts: int = 4
    experts_per_token: int = 2
    num_shared_experts: int = 1
    expert_size: int = 96
    num_hash_layers: int = 1
    """The first layers route by token id through a fixed table instead of by learned affinity."""
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0

    # --- precision
    cache_precision: Literal["mixed", "bf16", "fp32"] = "mixed"
    qat: bool = True
    """Train with the cache formats, FP4 index queries and FP4 expert weights in the loop (straight-through)."""

    def __post_init__(self) -> None:
        if not isinstance(self.layers, list | tuple):
            raise ConfigError(f"model.layers: expected a list of mixer names, found {self.layers!r}")
        object.__setattr__(self, "layers", tuple(self.layers))
        _check_types(self)
        _validate(self)

    # --- construction

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """The preset ``name`` (see :data:`PRESETS`) with some fields replaced. Raises ConfigError."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(f"model.preset: unknown preset '{name}'; there are {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from plain values, as read from YAML or JSON. A key ``preset`` names the starting point."""
        values = dict(values)
        preset = values.pop("preset", None)
        if preset is not None:
            return cls.from_preset(preset, **values)
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                raise ConfigError(f"model.{key}: unknown key{hint}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> ModelConfig:
        """Read the ``model`` section of a recipe, or a file that holds only that section."""
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: expected a mapping at the top level")
        return cls.from_dict(content.get("model", content))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**dataclasses.asdict(self), "layers": list(self.layers)}

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    # --- derived

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def page_tokens(self) -> int:
        """Tokens covered by one cache page: the least common multiple of the ratios in use (report 3.5.1)."""
        return math.lcm(*(self.compress_ratio(name) for name in self.layers))

    def compress_ratio(self, mixer: str) -> int:
        """Tokens per compressed entry; 1 for mixers that keep every token, or none."""
        return {"csa": self.csa_ratio, "hca": self.hca_ratio}.get(mixer, 1)


# Proportions that both releases share and that these keep: rope = 1/4..1/8 of the head, index head = 1/4..1/2 of the
# head, one csa per hca, the last layer is csa, 4:1 output groups.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"zero_init_output": True, "init_std": 0.04},
    # 35.3M parameters with the byte vocabulary: the size every benchmark speaks of.
    "small": {
        "hidden_size": 512,
        "layers": ("sliding", "sliding", "csa", "hca", "csa", "hca", "csa", "hca"),
        "max_positions": 1_048_576,
        "num_heads": 8,
        "head_dim": 128,
        "rope_head_dim": 16,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "window": 128,
        "hca_ratio": 128,
        "index_heads": 16,
        "index_head_dim": 32,
        "index_topk": 128,
        "num_experts": 8,
        "expert_size": 256,
        "num_hash_layers": 0,
    },
    "base": {
        "hidden_size": 1536,
        "layers": ("sliding", "sliding", *("csa", "hca") * 9, "csa"),
        "max_positions": 1_048_576,
        "vocab_size": 32_768,
        "num_heads": 16,
        "head_dim": 256,
        "rope_head_dim": 32,
        "q_lora_rank": 384,
        "o_groups": 2,
        "o_lora_rank": 512,
        "window": 128,
        "hca_ratio": 128,
        "index_heads": 32,
        "index_head_dim": 64,
        "index_topk": 512,
        "num_experts": 16,
        "expert_size": 640,
        "num_hash_layers": 3,
    },
}


def _check_types(config: ModelConfig) -> None:
    """Types first, so that a string where a number belongs is named instead of failing inside a comparison."""
    hints = typing.get_type_hints(ModelConfig)
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        origin = typing.get_origin(hint)
        if origin is Literal:
            allowed = typing.get_args(hint)
            if value not in allowed:
                raise ConfigError(f"model.{field.name}: '{value}' is not one of {', '.join(map(str, allowed))}")
        elif origin is tuple:
            for name in value:
                if name not in MIXER_NAMES:
                    raise ConfigError(f"model.layers: '{name}' is not one of {', '.join(MIXER_NAMES)}")
        elif hint is float:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"model.{field.name}: expected a number, found {value!r}")
            object.__setattr__(config, field.name, float(value))
        elif not isinstance(hint, types.UnionType) and type(value) is not hint:
            raise ConfigError(f"model.{field.name}: expected {hint.__name__}, found {value!r}")


def _validate(c: ModelConfig) -> None:
    def need(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError("model." + message)

    positive = (
        "vocab_size",
        "hidden_size",
        "max_positions",
        "num_heads",
        "head_dim",
        "rope_head_dim",
        "q_lora_rank",
        "o_groups",
        "o_lora_rank",
        "window",
        "csa_ratio",
        "hca_ratio",
        "index_heads",
        "index_head_dim",
        "index_topk",
        "num_kv_heads",
        "hc_mult",
        "hc_sinkhorn_iters",
        "ffn_size",
        "num_experts",
        "experts_per_token",
        "expert_size",
        "yarn_original_positions",
    )
    for name in positive:
        need(getattr(c, name) >= 1, f"{name}: must be at least 1, found {getattr(c, name)}")
    for name in ["norm_eps", "rope_theta", "compress_rope_theta", "routed_scaling_factor", "swiglu_limit", "hc_eps"]:
        need(getattr(c, name) > 0, f"{name}: must be positive, found {getattr(c, name)}")
    need(len(c.layers) >= 1, "layers: the schedule is empty")
    need(c.yarn_factor >= 1, f"yarn_factor: must be at least 1, found {c.yarn_factor}")
    need(
        c.num_heads % c.o_groups == 0, f"num_heads: {c.num_heads} heads do not divide into o_groups {c.o_groups} groups"
    )
    need(c.rope_head_dim % 2 == 0, f"rope_head_dim: must be even, found {c.rope_head_dim}")
    need(
        c.rope_head_dim < c.head_dim,
        f"rope_head_dim: {c.rope_head_dim} leaves no unrotated dims in head_dim {c.head_dim}",
    )
    need(c.head_dim % 2 == 0, f"head_dim: must be even, found {c.head_dim}")
    if "csa" in c.layers:
        need(
            c.index_head_dim & (c.index_head_dim - 1) == 0,
            f"index_head_dim: must be a power of two for the Hadamard rotation, found {c.index_head_dim}",
        )
        need(
            c.rope_head_dim <= c.index_head_dim,
            f"rope_head_dim: {c.rope_head_dim} is wider than index_head_dim {c.index_head_dim}",
        )
        need(c.csa_ratio >= 2, f"csa_ratio: must be at least 2, found {c.csa_ratio}")
    if "hca" in c.layers:
        need(c.hca_ratio >= 2, f"hca_ratio: must be at least 2, found {c.hca_ratio}")
    if "gqa" in c.layers:
        need(
            c.num_heads % c.num_kv_heads == 0,
            f"num_heads: {c.num_heads} query heads do not divide into num_kv_heads {c.num_kv_heads}",
        )
    if c.ffn == "moe":
        need(
            c.experts_per_token <= c.num_experts,
            f"experts_per_token: {c.experts_per_token} exceeds num_experts {c.num_experts}",
        )
        need(c.num_shared_experts >= 0, f"num_shared_experts: must not be negative, found {c.num_shared_experts}")
        need(
            0 <= c.num_hash_layers <= len(c.layers),
            f"num_hash_layers: {c.num_hash_layers} does not fit a schedule of {len(c.layers)} layers",
        )
