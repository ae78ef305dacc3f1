"""Configuration of the network: shapes, formats and the layer schedule.

Field names follow DeepSeek-V4's release where possible. Presets are in :mod:`model.presets`, depth scaling
in :mod:`model.depth`.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.cache.parts import GrowingPart
from model.depth import depth_values
from model.errors import ConfigError, unknown_key
from model.mixers import MIXERS
from model.mixers.base import Mixer, require
from model.mixers.given_options import complete_options
from model.mixers.options import is_number
from model.presets import PRESETS
from model.wording import TYPE_NAMES, quote

MAX_LAYERS = 1000
MTP_MIXER = "sliding"
"""Mixer of the multi-token prediction module's block."""
CACHE_FORMATS = ("kv_format", "rope_format", "index_format", "gqa_format")
"""Fields with the storage format of each tensor role in the cache."""
FeedForwardKind = Literal["moe", "dense", "none"]
CacheFormat = Literal["fp4", "fp8", "fp8_128", "bf16", "fp32"]
"""FP4 E2M1 with an E8M0 scale per 32 dims, FP8 E4M3 with an E8M0 scale per 64 dims or an FP32 scale per 128 dims
(DeepSeek-V3.2), or plain floats."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Hyperparameters of a network. Immutable; derive variants with :meth:`replace`.

    The V4 recipe makes five choices, each with one switch:

    1. hybrid attention: ``layers`` (names of :data:`model.mixers.MIXERS`);
    2. precision per tensor role: :data:`CACHE_FORMATS`, each a :data:`CacheFormat`;
    3. Muon: ``train.optimizer.rule`` in the recipe;
    4. hyper-connections: ``hyper_connections``;
    5. quantization-aware training: ``qat``.
    """

    # --- size
    vocab_size: int = 258
    hidden_size: int = 128
    layers: tuple[str, ...] = ("sliding", "csa", "hca", "csa")
    mtp_layers: int = 0
    """1 adds a multi-token prediction module: a ``sliding`` block that is trained to predict the token after next.
    Speculative decoding drafts with it."""
    max_positions: int = 65_536
    norm_eps: float = 1e-6
    init_std: float = 0.02
    tie_word_embeddings: bool = False
    """Use the embedding as the weight of the head."""
    zero_init_output: bool = False
    """Initialize the last projection of every attention and feed-forward block to zero. The release only gives
    "std 0.02". Zero initialization learns faster over a few hundred steps, so the tiny recipes use it."""

    # --- attention of sliding, csa and hca layers; gqa also uses num_heads and head_dim, mla and dsa num_heads
    num_heads: int = 4
    head_dim: int = 64
    rope_head_dim: int = 16
    q_lora_rank: int = 64
    """Width of the latent that queries are projected from. Not the option ``q_lora_rank`` of mla and dsa layers, which
    is in ``mixer_options``."""
    o_groups: int = 2
    o_lora_rank: int = 32
    window: int = 16
    """Uncompressed tokens visible to each query, itself included."""
    rope_theta: float = 10_000.0
    """Base of sliding, gqa, mla and dsa layers. Sliding and gqa layers do not use YaRN."""
    compress_rope_theta: float = 160_000.0
    """Base of csa and hca layers: queries, window, entries and indexer."""
    yarn_factor: float = 1.0
    """YaRN scaling factor of csa, hca, mla and dsa layers; 1 disables YaRN. The attention factor of csa and hca stays
    1.0."""
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

    mixer_options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Mixer-specific options by mixer name (:attr:`model.mixers.base.Mixer.options`)."""

    # --- residual stream
    hyper_connections: bool = True
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    hc_alpha_init: float = 0.01
    """Published (mHC paper, table 5)."""
    hc_comb_init: Literal["uniform", "identity"] = "uniform"
    """Initial mixing matrix (unpublished). ``uniform``, the result of zero biases, starts as a plain residual on the
    mean of the streams. ``identity`` keeps the streams separate."""

    # --- feed-forward
    ffn: FeedForwardKind = "moe"
    """Mixture of experts, one SwiGLU, or no feed-forward half (Mamba-2)."""
    first_k_dense_replace: int = 0
    """Number of leading layers with a dense feed-forward block instead of a mixture of experts."""
    ffn_size: int = 256
    """Inner width of dense feed-forward blocks."""
    num_experts: int = 4
    experts_per_token: int = 2
    num_shared_experts: int = 1
    expert_size: int = 96
    num_hash_layers: int = 1
    """Number of leading layers that route by a fixed table of token IDs instead of learned affinity."""
    scoring_func: Literal["sqrtsoftplus", "sigmoid"] = "sqrtsoftplus"
    """Affinity of an expert by its router logit. DeepSeek-V3.2 and Kimi Linear use ``sigmoid``."""
    n_group: int = 1
    topk_group: int = 1
    """The experts of a token come from ``topk_group`` of ``n_group`` groups of consecutive experts (V3)."""
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    """Bound of the SwiGLU inputs; 0 for none."""

    # --- precision; the defaults are DeepSeek-V4's (report 2.3.4, 5.2.1)
    kv_format: CacheFormat = "fp8"
    """Format of the unrotated dims of window and compressed entries, and of latents."""
    rope_format: Literal["bf16", "fp32"] = "bf16"
    """Format of the rotary dims of window and compressed entries, and of the rotary keys stored with latents."""
    index_format: CacheFormat = "fp4"
    """Format of index keys in the cache, and of index queries in their products."""
    index_scores: Literal["bf16", "fp32"] = "fp32"
    """Dtype of the index scores. BF16 makes top-k faster and rarely causes ties (report 5.2.1)."""
    gqa_format: CacheFormat = "bf16"
    """Format of keys and values of gqa layers."""
    qat: bool = True
    """Train with fake quantization of cache entries, index queries and expert weights (FP4), using straight-through
    gradients."""

    def __post_init__(self) -> None:
        if not isinstance(self.layers, list | tuple):
            raise ConfigError(f"layers: expected a list of mixer names, found {quote(self.layers)}")
        object.__setattr__(self, "layers", tuple(self.layers))
        _check_types(self)
        object.__setattr__(self, "mixer_options", complete_options(self.mixer_options, self.block_mixers))
        _validate(self)

    # --- construction

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """Return the preset ``name`` of :data:`model.presets.PRESETS` with fields replaced. Raises ConfigError."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(f"preset: unknown preset '{name}'; there are {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def from_depth(cls, depth: int, family: str = "v4", **overrides: Any) -> ModelConfig:
        """Return the network of a family (:data:`model.depth.FAMILIES`) scaled to ``depth`` layers, with fields
        replaced; 43 layers of ``v4`` are Flash. Replacing ``layers`` keeps the widths of ``depth``. Raises
        ConfigError."""
        values = depth_values(depth, family)
        if overrides.keys() >= {field.name for field in dataclasses.fields(cls)} - {"mixer_options"}:
            raise ConfigError(f"depth: {depth} has no effect, because every field of the model is already set")
        return cls.from_dict({**values, **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from plain values, as read from YAML or JSON, on top of a ``preset`` or ``depth`` (of ``family``) if
        given. Raises ConfigError."""
        values = dict(values)
        preset, depth, family = (values.pop(key, None) for key in ("preset", "depth", "family"))
        if preset is not None and depth is not None:
            raise ConfigError(f"depth: {quote(depth)} and preset '{preset}' are mutually exclusive")
        if family is not None and depth is None:
            raise ConfigError(f"family: '{family}' is scaled by depth, which is not given")
        if preset is not None:
            return cls.from_preset(preset, **values)
        if depth is not None:
            return cls.from_depth(depth, "v4" if family is None else family, **values)
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(unknown_key(f"{key}", str(key), known))
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> ModelConfig:
        """Read the ``model`` section of a recipe, or a file with only that section. Raises ConfigError."""
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: expected a mapping at the top level")
        section = content.get("model", content)
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: model: expected a mapping, found {quote(section)}")
        return cls.from_dict(section)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        options = {name: dict(values) for name, values in self.mixer_options.items()}
        values = {**dataclasses.asdict(self), "layers": list(self.layers), "mixer_options": options}
        return values if options else {key: value for key, value in values.items() if key != "mixer_options"}

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    # --- derived

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def mixers(self) -> list[type[Mixer]]:
        """Mixer of each layer."""
        return [MIXERS[name] for name in self.layers]

    @property
    def block_mixers(self) -> list[type[Mixer]]:
        """Mixer of each block: all layers, then the multi-token prediction module."""
        return self.mixers + [MIXERS[MTP_MIXER]] * (self.mtp_layers > 0)

    @property
    def ffn_kinds(self) -> list[FeedForwardKind]:
        """Kind of each layer's feed-forward block."""
        return self.block_ffn_kinds[: self.num_layers]

    @property
    def block_ffn_kinds(self) -> list[FeedForwardKind]:
        """Kind of each block's feed-forward block: all layers, then the multi-token prediction module."""
        leading: list[FeedForwardKind] = ["dense"] * self.first_k_dense_replace
        return leading + [self.ffn] * (self.num_layers + self.mtp_layers - len(leading))

    @property
    def swiglu_bound(self) -> float:
        """Bound of the SwiGLU inputs; infinite for none."""
        return self.swiglu_limit or math.inf

    @property
    def indexed_layers(self) -> list[int]:
        """Indices of layers whose mixer has an indexer."""
        return list(self.indexer_ratios)

    @property
    def indexer_ratios(self) -> dict[int, int]:
        """Tokens per entry that a layer's indexer scores, by layer with an indexer."""
        ratios = ((layer, mixer.indexer_ratio(self)) for layer, mixer in enumerate(self.mixers))
        return {layer: ratio for layer, ratio in ratios if ratio is not None}

    @property
    def page_tokens(self) -> int:
        """Tokens per cache page: the smallest multiple of the least common multiple of the compression ratios (report
        3.5.1) that is at least 64. With smaller pages, the page table would outgrow the entries."""
        parts = [part for mixer in set(self.mixers) for part in mixer.cache_parts(self).values()]
        common = math.lcm(*(part.ratio for part in parts if isinstance(part, GrowingPart)))
        return -(-64 // common) * common


def _check_types(config: ModelConfig) -> None:
    """Raise ConfigError for values of the wrong type. Runs before range checks, which would fail on a string."""
    hints = typing.get_type_hints(ModelConfig)
    for field in dataclasses.fields(config):
        value, hint, origin = getattr(config, field.name), hints[field.name], typing.get_origin(hints[field.name])
        if origin is Literal:
            if value not in (allowed := typing.get_args(hint)):
                raise ConfigError(f"{quote(value)} is not one of {', '.join(map(str, allowed))}", field.name)
        elif origin is tuple:
            for name in value:
                if not isinstance(name, str) or name not in MIXERS:
                    raise ConfigError(f"{quote(name)} is not one of {', '.join(MIXERS)}", "layers")
        elif hint is float:
            expected = "a finite number" if isinstance(value, float) else TYPE_NAMES[float]
            require(is_number(value), f"expected {expected}, found {quote(value)}", field.name)
            object.__setattr__(config, field.name, float(value))
        elif origin is not Mapping and type(value) is not hint:
            raise ConfigError(f"expected {TYPE_NAMES[hint]}, found {quote(value)}", field.name)


def _validate(c: ModelConfig) -> None:
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
        "n_group",
        "topk_group",
        "yarn_original_positions",
    )
    for name in positive:
        require(getattr(c, name) >= 1, f"must be at least 1, found {getattr(c, name)}", name)
        require(getattr(c, name) < 1 << 31, f"must be below 2 ** 31, found {getattr(c, name)}", name)
    for name in ["norm_eps", "rope_theta", "compress_rope_theta", "routed_scaling_factor", "hc_eps"]:
        require(getattr(c, name) > 0, f"must be positive, found {getattr(c, name)}", name)
    require(c.swiglu_limit >= 0, f"must not be negative, found {c.swiglu_limit}", "swiglu_limit")
    require(len(c.layers) >= 1, "the schedule is empty", "layers")
    require(len(c.layers) <= MAX_LAYERS, f"expected at most {MAX_LAYERS}, found {len(c.layers)}", "layers")
    require(c.hc_sinkhorn_iters <= 1000, f"expected at most 1000, found {c.hc_sinkhorn_iters}", "hc_sinkhorn_iters")
    require(c.mtp_layers in (0, 1), f"must be 0 or 1, found {c.mtp_layers}", "mtp_layers")
    require(c.init_std >= 0, f"must not be negative, found {c.init_std}", "init_std")
    require(c.yarn_factor >= 1, f"must be at least 1, found {c.yarn_factor}", "yarn_factor")
    require(c.rope_head_dim % 2 == 0, f"must be even, found {c.rope_head_dim}", "rope_head_dim")
    require(
        c.rope_head_dim < c.head_dim,
        f"{c.rope_head_dim} leaves no unrotated dims in head_dim {c.head_dim}",
        "rope_head_dim",
    )
    require(c.head_dim % 2 == 0, f"must be even, found {c.head_dim}", "head_dim")
    for mixer in set(c.block_mixers):
        mixer.check(c)
    require(
        c.first_k_dense_replace == 0 or (c.ffn == "moe" and 0 < c.first_k_dense_replace < len(c.layers)),
        f"expected 0, or with ffn 'moe' fewer than all {len(c.layers)} layers, found {c.first_k_dense_replace}",
        "first_k_dense_replace",
    )
    if c.ffn == "moe":
        _validate_experts(c)


def _validate_experts(c: ModelConfig) -> None:
    require(
        c.experts_per_token <= c.num_experts,
        f"{c.experts_per_token} exceeds num_experts {c.num_experts}",
        "experts_per_token",
    )
    require(c.num_shared_experts >= 0, f"must not be negative, found {c.num_shared_experts}", "num_shared_experts")
    require(
        0 <= c.num_hash_layers <= len(c.layers),
        f"{c.num_hash_layers} does not fit a schedule of {len(c.layers)} layers",
        "num_hash_layers",
    )
    require(
        not (c.num_hash_layers and c.first_k_dense_replace),
        f"{c.num_hash_layers} leading layers cannot be hash-routed, because first_k_dense_replace "
        f"makes {c.first_k_dense_replace} of them dense; set one of the two to 0",
        "num_hash_layers",
    )
    require(c.topk_group <= c.n_group, f"{c.topk_group} exceeds n_group {c.n_group}", "topk_group")
    require(
        c.n_group == 1 or (c.num_experts % c.n_group == 0 and c.num_experts >= 2 * c.n_group),
        f"{c.num_experts} experts (num_experts) do not divide into {c.n_group} groups of at least 2",
        "n_group",
    )
    available = c.num_experts // c.n_group * c.topk_group
    require(
        c.experts_per_token <= available,
        f"{c.experts_per_token} exceeds the {available} experts of topk_group {c.topk_group} groups",
        "experts_per_token",
    )
