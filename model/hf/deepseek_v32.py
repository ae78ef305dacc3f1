"""DeepSeek-V3.2: ``DeepseekV32ForCausalLM`` of transformers."""

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
from model.hf.name_table import NameTable, parse_names
from model.hf.rope import flat_scaling, flat_theta, read_yarn, write_yarn
from model.hf.tensors import Layout, Source
from model.mixers.dsa import DeepSeekSparseAttention as Mixer

_INDEXER = parse_names("""
    attn.indexer.wq_b.          self_attn.indexer.wq_b.
    attn.indexer.wk.            self_attn.indexer.wk.
    attn.indexer.k_norm.        self_attn.indexer.k_norm.
    attn.indexer.k_norm.bias    self_attn.indexer.k_norm.bias
    attn.indexer.weights_proj.  self_attn.indexer.weights_proj.
""")
_NAMES = NameTable(
    model=MODEL,
    block={**NORMS, **LATENT_ATTENTION, **_INDEXER, **feed_forward("mlp")},
    block_prefix="model.layers.N.",
    experts="mlp.experts.",
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_OPTIONS = ("q_lora_rank", *SIZES)
_MSCALES = ("mscale", "mscale_all_dim")
_DENSE_LAYERS = 3
"""Default of transformers."""


class DeepseekV32(Family):
    """Latent attention to tokens that an indexer selects, and experts after leading dense layers."""

    title = "DeepSeek-V3.2"
    model_type = "deepseek_v32"
    architecture = "DeepseekV32ForCausalLM"
    mixers = {"indexed_attention": "dsa"}  # noqa: RUF012
    fields = {  # noqa: RUF012
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "max_position_embeddings": "max_positions",
        "rms_norm_eps": "norm_eps",
        "initializer_range": "init_std",
        "num_attention_heads": "num_heads",
        "index_n_heads": "index_heads",
        "index_head_dim": "index_head_dim",
        "index_topk": "index_topk",
        "intermediate_size": "ffn_size",
        "moe_intermediate_size": "expert_size",
        "n_routed_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
        "num_experts_per_tok": "experts_per_token",
        "n_group": "n_group",
        "topk_group": "topk_group",
        "routed_scaling_factor": "routed_scaling_factor",
    }
    fixed = {  # noqa: RUF012
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
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

    def read_fields(self, r: ConfigReader) -> dict[str, Any]:
        check_keys(r)
        count = r.layer_count()
        if r.has("layer_types"):
            r.one_per_layer("layer_types", count, tuple(self.mixers))
        options: dict[str, Any] = {key: r.integer(key) for key in _OPTIONS}
        scaling, inside = flat_scaling(r)
        yarn = read_yarn(r, scaling, inside)
        for key in _MSCALES if yarn else ():
            options[key] = r.number(key, scaling, inside) if scaling.get(key) is not None else 0.0
        if scaling.get("attention_factor") is not None:
            raise r.wrong(f"{inside}attention_factor", "none (it follows from 'mscale')", scaling["attention_factor"])
        return {
            "layers": [Mixer.name] * count,
            "rope_theta": flat_theta(r),
            **yarn,
            **read_feed_forward(r, count, _DENSE_LAYERS),
            "mixer_options": {Mixer.name: options},
        }

    def other_keys(self) -> Mapping[str, str]:
        options = {f"mixer_options.{Mixer.name}.{name}": name for name in (*_OPTIONS, *_MSCALES)}
        return options | {"layers": "num_hidden_layers", "yarn_factor": "factor"}

    def write_fields(self, config: ModelConfig, layout: Layout, experts: ExpertFormat) -> dict[str, Any]:
        options, rope = config.mixer_options[Mixer.name], {"rope_theta": config.rope_theta, "rope_type": "default"}
        if yarn := write_yarn(config):
            rope |= {"rope_type": "yarn", **yarn, **{key: options[key] for key in _MSCALES if options[key]}}
        return {
            "layer_types": [next(iter(self.mixers))] * config.num_layers,
            "num_key_value_heads": config.num_heads,
            "rope_theta": config.rope_theta,
            "rope_parameters": rope,
            **{key: options[key] for key in _OPTIONS},
            **write_feed_forward(config),
        }

    def check_expressible(self, config: ModelConfig, layout: Layout) -> None:
        super().check_expressible(config, layout)
        check_feed_forward(self, config)

    def detect_layout(self, names: Iterable[str]) -> Layout:
        return "modules" if any(name.endswith(".experts.gate_up_proj") for name in names) else "transformers"

    def sources(self, config: ModelConfig, shapes: dict[str, Size], layout: Layout) -> dict[str, Source]:
        return _NAMES.sources(shapes, layout)

    def drafts(self, names: Iterable[str], config: ModelConfig) -> set[str]:
        """Return the tensors of layers after the last one that project an embedding concatenated with their input."""
        layer_of = {name: int(match[1]) for name in names if (match := _LAYER.match(name))}
        modules = {n for name, n in layer_of.items() if n >= config.num_layers and name.endswith(".eh_proj.weight")}
        return {name for name, layer in layer_of.items() if layer in modules}
