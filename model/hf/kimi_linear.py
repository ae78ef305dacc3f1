"""Kimi Linear: ``KimiLinearForCausalLM`` of transformers, under the names of Moonshot's release."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Size

from model.config import ModelConfig
from model.hf.config_reader import ConfigReader
from model.hf.family import ExpertFormat, Family
from model.hf.latent_moe import (
    LATENT_ATTENTION,
    MODEL,
    NORMS,
    SIZES,
    check_feed_forward,
    check_keys,
    feed_forward,
    read_feed_forward,
    write_feed_forward,
)
from model.hf.name_table import NameTable, Pieces, parse_names
from model.hf.tensors import Layout, Source
from model.mixers.kda import KimiDeltaAttention
from model.mixers.mla import MultiHeadLatentAttention

_DELTA, _LATENT = KimiDeltaAttention.name, MultiHeadLatentAttention.name
_DELTA_NAMES = parse_names("""
    attn.conv.        self_attn.conv1d.        filters
    attn.decay_proj.  self_attn.f_b_proj.
    attn.gate_proj.   self_attn.g_b_proj.
    attn.A_log        self_attn.A_log          heads
    attn.dt_bias      self_attn.dt_bias
    attn.norm.        self_attn.o_norm.
    attn.out_proj.    self_attn.o_proj.
""")
_NAMES = NameTable(
    model=MODEL,
    block={**NORMS, **LATENT_ATTENTION, **_DELTA_NAMES, **feed_forward("block_sparse_moe")},
    block_prefix="model.layers.N.",
    experts="block_sparse_moe.experts.",
    expert_weights=("w1", "w3", "w2"),
)
_STACKED = (".experts.gate_up_proj", ".self_attn.conv1d.weight")
"""Tensors of transformers' modules that the release stores in pieces."""
_DELTA_KEYS = {
    "num_heads": "linear_num_heads",
    "head_dim": "linear_head_dim",
    "conv_kernel": "linear_conv_kernel_dim",
}
"""Keys of transformers by option. The release has them in the mapping ``linear_attn_config``."""
_RELEASED_DELTA_KEYS = {"num_heads": "num_heads", "head_dim": "head_dim", "conv_kernel": "short_conv_kernel_size"}
_DENSE_LAYERS = 1
"""Default of transformers."""


class KimiLinear(Family):
    """Kimi Delta Attention and latent attention without positions, and experts after leading dense layers."""

    title = "Kimi Linear"
    model_type = "kimi_linear"
    architecture = "KimiLinearForCausalLM"
    mixers = {"full_attention": _LATENT, "linear_attention": _DELTA}  # noqa: RUF012
    fields = {  # noqa: RUF012
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "model_max_length": "max_positions",
        "rms_norm_eps": "norm_eps",
        "initializer_range": "init_std",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_size",
        "moe_intermediate_size": "expert_size",
        "num_experts": "num_experts",
        "num_shared_experts": "num_shared_experts",
        "num_experts_per_token": "experts_per_token",
        "num_expert_group": "n_group",
        "topk_group": "topk_group",
        "routed_scaling_factor": "routed_scaling_factor",
    }
    fixed = {  # noqa: RUF012
        "moe_router_activation_func": "sigmoid",
        "moe_renormalize": True,
        "mla_use_nope": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    needs = {  # noqa: RUF012
        "hyper_connections": False,
        "scoring_func": "sigmoid",
        "swiglu_limit": 0.0,
        "num_hash_layers": 0,
        "tie_word_embeddings": False,
    }
    own_options = {"state_format": _DELTA}  # noqa: RUF012

    def read_fields(self, r: ConfigReader) -> dict[str, Any]:
        check_keys(r)
        count = r.layer_count()
        latent: dict[str, Any] = {key: r.integer(key) for key in SIZES}
        latent["q_lora_rank"] = r.integer("q_lora_rank") if r.has("q_lora_rank") else None
        return {
            "layers": self._read_layers(r, count),
            **read_feed_forward(r, count, _DENSE_LAYERS),
            "mixer_options": {_LATENT: {**latent, "rope": False}, _DELTA: _read_delta(r)},
        }

    def _read_layers(self, r: ConfigReader, count: int) -> list[str]:
        """Return the mixers from ``layer_types`` or the released lists of layers, which count from 1."""
        if r.has("layer_types"):
            return [self.mixers[name] for name in r.one_per_layer("layer_types", count, tuple(self.mixers))]
        released = r.mapping("linear_attn_config")
        if not released:
            raise r.missing("layer_types", "linear_attn_config")
        mixers: dict[int, str] = {}
        for key, mixer in (("full_attn_layers", _LATENT), ("kda_layers", _DELTA)):
            layers = released.get(key)
            if not isinstance(layers, list) or not all(type(n) is int and 1 <= n <= count for n in layers):
                raise r.wrong(f"linear_attn_config.{key}", f"a list of layers from 1 to {count}", layers)
            if twice := [n for n in layers if n in mixers or layers.count(n) > 1]:
                raise r.error(f"key 'linear_attn_config.{key}': lists layer {twice[0]} a second time")
            mixers |= dict.fromkeys(layers, mixer)
        if missing := [n for n in range(1, count + 1) if n not in mixers]:
            raise r.error(f"key 'linear_attn_config': lists layer {missing[0]} of {count} neither as full nor as kda")
        return [mixers[n] for n in range(1, count + 1)]

    def other_keys(self) -> Mapping[str, str]:
        latent = {f"mixer_options.{_LATENT}.{name}": name for name in (*SIZES, "q_lora_rank")}
        delta = {f"mixer_options.{_DELTA}.{name}": key for name, key in _DELTA_KEYS.items()}
        return {
            **latent,
            **delta,
            f"mixer_options.{_DELTA}.state_format": "state_format",
            "layers": "num_hidden_layers",
        }

    def write_fields(self, config: ModelConfig, layout: Layout, experts: ExpertFormat) -> dict[str, Any]:
        options = config.mixer_options
        latent = options.get(_LATENT, {**MultiHeadLatentAttention.options, "q_lora_rank": None})
        delta = dict(options.get(_DELTA, KimiDeltaAttention.options))
        if _DELTA in options:
            delta["num_heads"], _ = KimiDeltaAttention.heads(config)
        delta["num_heads"] = delta["num_heads"] or config.num_heads
        types = {mixer: name for name, mixer in self.mixers.items()}
        return {
            "layer_types": [types[name] for name in config.layers],
            "num_key_value_heads": config.num_heads,
            **{key: latent[key] for key in (*SIZES, "q_lora_rank")},
            **{key: delta[option] for option, key in _DELTA_KEYS.items()},
            **write_feed_forward(config),
        }

    def check_expressible(self, config: ModelConfig, layout: Layout) -> None:
        super().check_expressible(config, layout)
        check_feed_forward(self, config)
        if _LATENT in config.layers:
            rope = config.mixer_options[_LATENT]["rope"]
            self.require(not rope, f"mixer_options.{_LATENT}.rope", "false", rope)

    def detect_layout(self, names: Iterable[str]) -> Layout:
        return "modules" if any(name.endswith(_STACKED) for name in names) else "transformers"

    def sources(self, config: ModelConfig, shapes: dict[str, Size], layout: Layout) -> dict[str, Source]:
        return _NAMES.sources(shapes, layout, _pieces(config, layout) if _DELTA in config.layers else None)

    def canonical_name(self, name: str) -> str:
        name = name.replace(".block_sparse_moe.", ".mlp.")
        return re.sub(r"\.self_attn\.forget_gate\.", ".self_attn.", name)


def _read_delta(r: ConfigReader) -> dict[str, Any]:
    """Return the options of Kimi Delta Attention from either place."""
    released = r.mapping("linear_attn_config")
    found = {}
    for option, key in _DELTA_KEYS.items():
        name = _RELEASED_DELTA_KEYS[option]
        value = released[name] if name in released else r.integer(key)
        if type(value) is not int:
            raise r.wrong(f"linear_attn_config.{name}", "a whole number", value)
        found[option] = value
    return found


def _pieces(config: ModelConfig, layout: Layout) -> Pieces:
    """Return the projections and, unless stacked, the convolutions that Kimi Delta Attention has as one tensor."""
    heads, head_dim = KimiDeltaAttention.heads(config)
    inner = heads * head_dim
    rows = {"q": inner, "k": inner, "v": inner, "f_a": head_dim, "g_a": head_dim, "b": heads}
    found = {"attn.in_proj.weight": [(f"self_attn.{name}_proj.weight", size, "same") for name, size in rows.items()]}
    if layout != "modules":
        found["attn.conv.weight"] = [(f"self_attn.{name}_conv1d.weight", inner, "filters") for name in "qkv"]
    return found
