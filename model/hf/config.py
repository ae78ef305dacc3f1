"""Conversion between ModelConfig and the ``config.json`` of transformers and of DeepSeek's release."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

from model.config import CACHE_FORMATS, ModelConfig
from model.errors import CheckpointError, ConfigError
from model.hf.names import Layout
from model.mixers.csa import CompressedSparseAttention
from model.mixers.hca import HeavilyCompressedAttention

MODEL_TYPE = "deepseek_v4"
OWN_KEY = "fiftyfold"
"""Key for fields without a published counterpart, :data:`OWN_FIELDS`."""
OWN_FIELDS = (*CACHE_FORMATS, "qat")
ExpertFormat = Literal["fp4", "fp8"]
MIXERS = {
    "sliding_attention": "sliding",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
# Keys that map directly to one of our fields. Both layouts write all of them.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "num_attention_heads": "num_heads",
    "head_dim": "head_dim",
    "q_lora_rank": "q_lora_rank",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "sliding_window": "window",
    "index_n_heads": "index_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
    "hc_mult": "hc_mult",
    "hc_sinkhorn_iters": "hc_sinkhorn_iters",
    "hc_eps": "hc_eps",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_size",
    "routed_scaling_factor": "routed_scaling_factor",
    "swiglu_limit": "swiglu_limit",
}
# Keys of which the network implements one value, which is also the default in transformers.
FIXED: dict[str, Any] = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
QUANTIZATION: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


class _Reader:
    """Typed access to the keys of one file. Errors name the key, the expected and the found value."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self.path, self.content = path, content

    def wrong(self, key: str, expected: str, found: Any) -> CheckpointError:
        return CheckpointError(f"{self.path}: key '{key}': expected {expected}, found {found!r}")

    def require(self, key: str) -> Any:
        if self.content.get(key) is None:
            raise CheckpointError(f"{self.path}: key '{key}' is missing")
        return self.content[key]

    def integer(self, key: str) -> int:
        value = self.require(key)
        if type(value) is not int:
            raise self.wrong(key, "an integer", value)
        return value

    def number(self, key: str, mapping: dict[str, Any] | None = None, inside: str = "") -> float:
        value = self.require(key) if mapping is None else mapping.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(f"{inside}{key}", "a number", value)
        return float(value)

    def items(self, key: str) -> list[Any]:
        value = self.require(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list", value)
        return value


def read_config(path: Path, content: dict[str, Any], **overrides: Any) -> ModelConfig:
    """Return the configuration that ``content`` describes, with fields of ModelConfig replaced by ``overrides``.

    Raises CheckpointError naming the key if the network does not implement its value.
    """
    r = _Reader(path, content)
    if content.get("model_type") != MODEL_TYPE:
        raise r.wrong("model_type", f"'{MODEL_TYPE}'", content.get("model_type"))
    for key, expected in FIXED.items():
        if content.get(key, expected) != expected:
            raise r.wrong(key, repr(expected), content[key])
    fields: dict[str, Any] = {ours: r.require(key) for key, ours in FIELDS.items()}
    fields["layers"], fields["csa_ratio"], fields["hca_ratio"] = _schedule(r)
    fields["num_hash_layers"] = _hash_layers(r, len(fields["layers"]))
    fields["rope_head_dim"] = _rope_dim(r)
    fields |= _rope(r)
    mtp = r.integer("num_nextn_predict_layers") if "num_nextn_predict_layers" in content else 0
    if mtp not in (0, 1) and "mtp_layers" not in overrides:
        raise r.wrong("num_nextn_predict_layers", "0 or 1", mtp)
    fields["mtp_layers"] = mtp
    fields |= _own_fields(r)
    _check_quantization(r)
    try:
        return ModelConfig.from_dict({**fields, **overrides})
    except ConfigError as error:
        key_of = {ours: key for key, ours in FIELDS.items()}
        message = re.sub(r"^model\.(\w+)", lambda match: f"key '{key_of.get(match[1], match[1])}'", str(error))
        raise CheckpointError(f"{path}: {message}") from error


def _own_fields(r: _Reader) -> dict[str, Any]:
    own = r.content.get(OWN_KEY, {})
    if not isinstance(own, dict) or set(own) - set(OWN_FIELDS):
        raise r.wrong(OWN_KEY, f"a mapping of {', '.join(OWN_FIELDS)}", own)
    return own


def _schedule(r: _Reader) -> tuple[list[str], int, int]:
    """Return mixers, csa ratio and hca ratio from ``layer_types`` or the released ``compress_ratios``."""
    count = r.integer("num_hidden_layers")
    ratios = {"csa": 4, "hca": 128}
    given = r.content.get("compress_rates") or {}
    if not isinstance(given, dict):
        raise r.wrong("compress_rates", "a mapping", given)
    for key, value in given.items():
        if MIXERS.get(key) not in ratios:
            raise r.wrong("compress_rates", "the two compressed layer types", key)
        ratios[MIXERS[key]] = value
    for name in ratios:  # an older name that transformers still reads
        ratios[name] = r.content.get(f"compress_rate_{name}", ratios[name])
    for name, ratio in ratios.items():
        if type(ratio) is not int:
            raise r.wrong("compress_rates", f"an integer for {name}", ratio)
    if r.content.get("layer_types") is not None:
        types = r.items("layer_types")
        if len(types) != count:
            raise r.wrong("layer_types", f"one entry for each of {count} layers", len(types))
        for name in types:
            if not isinstance(name, str) or name not in MIXERS:
                raise r.wrong("layer_types", f"one of {', '.join(MIXERS)}", name)
        return [MIXERS[name] for name in types], ratios["csa"], ratios["hca"]
    if r.content.get("compress_ratios") is None:
        # transformers has a default schedule that matches neither release.
        raise CheckpointError(f"{r.path}: keys 'layer_types' and 'compress_ratios' are both missing")
    entries = r.items("compress_ratios")
    if len(entries) < count or any(entries[count:]):
        expected = f"{count} entries, one for each layer, then zeros for prediction modules"
        raise r.wrong("compress_ratios", expected, entries)
    # In the released code, ratio 4 overlaps and has an indexer; other ratios do not.
    others = dict.fromkeys(ratio for ratio in entries[:count] if ratio not in (0, 4))
    for ratio in others:
        if type(ratio) is not int or ratio < 0 or ratio != next(iter(others)):
            raise r.wrong("compress_ratios", "0, 4, or one other ratio", ratio)
    layers = [{0: "sliding", 4: "csa"}.get(ratio, "hca") for ratio in entries[:count]]
    return layers, 4, next(iter(others), ratios["hca"])


def _hash_layers(r: _Reader, count: int) -> int:
    if r.content.get("mlp_layer_types") is None:
        return min(r.integer("num_hash_layers"), count)
    types = r.items("mlp_layer_types")
    hashed = types.count("hash_moe")
    if types != ["hash_moe"] * hashed + ["moe"] * (count - hashed):
        raise r.wrong("mlp_layer_types", f"{count} entries, 'hash_moe' ones first and then 'moe'", types)
    return hashed


def _rope_dim(r: _Reader) -> int:
    """Return the rotary dims per head from ``qk_rope_head_dim`` and ``partial_rotary_factor``, which must agree."""
    found: dict[str, Any] = {}
    if r.content.get("qk_rope_head_dim") is not None:
        found["qk_rope_head_dim"] = r.integer("qk_rope_head_dim")
    if r.content.get("partial_rotary_factor") is not None:
        found["partial_rotary_factor"] = int(r.integer("head_dim") * r.number("partial_rotary_factor"))
    rope = r.content.get("rope_parameters")
    for name in ("main", "compress"):
        inner = rope.get(name) if isinstance(rope, dict) else None
        if isinstance(inner, dict) and "partial_rotary_factor" in inner:
            factor = r.number("partial_rotary_factor", inner, f"rope_parameters.{name}.")
            found[f"rope_parameters.{name}.partial_rotary_factor"] = int(r.integer("head_dim") * factor)
    if not found:
        raise CheckpointError(f"{r.path}: keys 'qk_rope_head_dim' and 'partial_rotary_factor' are both missing")
    (first, value), *others = found.items()
    for key, other in others:
        if other != value:
            raise r.wrong(key, f"{value} rotary dims as in '{first}'", other)
    return value


def _rope(r: _Reader) -> dict[str, Any]:
    """Return rotary bases and YaRN fields from nested ``rope_parameters`` or the released ``rope_scaling``."""
    nested = r.content.get("rope_parameters")
    if isinstance(nested, dict) and isinstance(nested.get("main"), dict) and isinstance(nested.get("compress"), dict):
        main, compress, inside = nested["main"], nested["compress"], "rope_parameters.compress."
        kind = main.get("rope_type", "default")
        if kind != "default":
            raise r.wrong("rope_parameters.main.rope_type", "'default'", kind)
        thetas = {
            "rope_theta": r.number("rope_theta", main, "rope_parameters.main."),
            "compress_rope_theta": r.number("rope_theta", compress, inside),
        }
    else:
        compress, inside = r.content.get("rope_scaling") or nested or {}, "rope_scaling."
        if not isinstance(compress, dict):
            raise r.wrong("rope_scaling", "a mapping", compress)
        # With flat scaling, both implementations use the attention factor 1.0.
        compress = {"attention_factor": 1.0, **compress}
        thetas = {key: r.number(key) for key in ("rope_theta", "compress_rope_theta")}
    kind = compress.get("rope_type", compress.get("type", "default"))
    if kind == "default":
        return thetas
    if kind != "yarn":
        raise r.wrong(f"{inside}rope_type", "'default' or 'yarn'", kind)
    # If a nested mapping has no attention factor, transformers uses 0.1 ln(factor) + 1.
    if compress.get("attention_factor") != 1.0:
        raise r.wrong(f"{inside}attention_factor", "1.0", compress.get("attention_factor"))
    if compress.get("truncate", True) is not True:
        raise r.wrong(f"{inside}truncate", "true", compress["truncate"])
    original = compress.get("original_max_position_embeddings")
    if type(original) is not int:
        raise r.wrong(f"{inside}original_max_position_embeddings", "an integer", original)
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, **compress}
    return {
        **thetas,
        "yarn_factor": r.number("factor", compress, inside),
        "yarn_original_positions": original,
        "yarn_beta_fast": r.number("beta_fast", defaults, inside),
        "yarn_beta_slow": r.number("beta_slow", defaults, inside),
    }


def _check_quantization(r: _Reader) -> None:
    quantization = r.content.get("quantization_config")
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise r.wrong("quantization_config", "a mapping", quantization)
    for key, expected in QUANTIZATION.items():
        if quantization.get(key, expected) != expected:
            raise r.wrong(f"quantization_config.{key}", repr(expected), quantization[key])
    experts = quantization.get("expert_dtype", r.content.get("expert_dtype"))
    if experts not in (None, "fp4", "fp8"):
        raise r.wrong("expert_dtype", "'fp4' or 'fp8'", experts)


def check_expressible(config: ModelConfig, layout: Layout) -> None:
    """Raise ConfigError if a DeepSeek-V4 checkpoint in ``layout`` cannot describe the network."""

    def require(ok: bool, key: str, expected: str, found: Any) -> None:
        if not ok:
            raise ConfigError(f"model.{key}: a DeepSeek-V4 checkpoint needs {expected}, found {found}")

    c = config
    for name in c.layers:
        require(name in MIXERS.values(), "layers", "only sliding, csa and hca layers", name)
    require(c.hyper_connections, "hyper_connections", "true", c.hyper_connections)
    require(c.ffn == "moe", "ffn", "'moe'", repr(c.ffn))
    require(c.num_shared_experts == 1, "num_shared_experts", "1", c.num_shared_experts)
    if layout == "released":
        csa, hca = CompressedSparseAttention in c.mixers, HeavilyCompressedAttention in c.mixers
        require(not csa or c.csa_ratio == 4, "csa_ratio", "4 in the released layout", c.csa_ratio)
        require(not hca or c.hca_ratio != 4, "hca_ratio", "other than 4 in the released layout", c.hca_ratio)
        for key in ("hidden_size", "expert_size"):
            value = getattr(c, key)
            require(value % 32 == 0, key, "a multiple of 32, the block of FP4 expert weights", value)


def write_config(config: ModelConfig, layout: Layout, experts: ExpertFormat, **extra: Any) -> dict[str, Any]:
    """Return the content of ``config.json``, including ``extra`` keys (token IDs, dtype)."""
    c = config
    content: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": MODEL_TYPE, **extra}
    content |= {key: getattr(c, ours) for key, ours in FIELDS.items()} | FIXED
    content[OWN_KEY] = {name: getattr(c, name) for name in OWN_FIELDS}
    content |= {"num_hidden_layers": c.num_layers, "num_nextn_predict_layers": c.mtp_layers, "use_cache": True}
    content |= {"rope_theta": c.rope_theta, "compress_rope_theta": c.compress_rope_theta}
    content["qk_rope_head_dim"] = c.rope_head_dim
    yarn: dict[str, Any] = {}
    if c.yarn_factor > 1:
        yarn = {
            "factor": c.yarn_factor,
            "original_max_position_embeddings": c.yarn_original_positions,
            "beta_fast": c.yarn_beta_fast,
            "beta_slow": c.yarn_beta_slow,
        }
    types = {ours: name for name, ours in MIXERS.items()}
    schedule: dict[str, Any] = {
        "layer_types": [types[name] for name in c.layers],
        "compress_rates": {types["csa"]: c.csa_ratio, types["hca"]: c.hca_ratio},
    }
    if layout == "transformers":
        factor = _rotary_factor(c)
        main = {"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": factor}
        compress = {**main, "rope_theta": c.compress_rope_theta}
        if yarn:
            compress |= {"rope_type": "yarn", "attention_factor": 1.0, **yarn}
        hashed = c.num_hash_layers
        return (
            content
            | schedule
            | {
                "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (c.num_layers - hashed),
                "partial_rotary_factor": factor,
                "rope_parameters": {"main": main, "compress": compress},
            }
        )
    ratio_of = {"sliding": 0, "csa": c.csa_ratio, "hca": c.hca_ratio}
    content |= {
        "compress_ratios": [ratio_of[name] for name in c.layers] + [0] * c.mtp_layers,
        "num_hash_layers": c.num_hash_layers,
        "expert_dtype": experts,
        "quantization_config": QUANTIZATION,
        "torch_dtype": "bfloat16",
    }
    if yarn:
        content["rope_scaling"] = {"type": "yarn", **yarn}
    if c.hca_ratio != 128:
        content |= schedule  # transformers only recognizes the released ratios without a schedule
    return content


def _rotary_factor(config: ModelConfig) -> float:
    """Return the rotary share of a head's dims, such that ``int(head_dim * factor)`` restores the dims."""
    factor = config.rope_head_dim / config.head_dim
    while int(config.head_dim * factor) < config.rope_head_dim:
        factor = math.nextafter(factor, 1.0)
    return factor
