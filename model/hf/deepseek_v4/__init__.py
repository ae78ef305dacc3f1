"""DeepSeek-V4: ``DeepseekV4ForCausalLM`` of transformers, and DeepSeek's release with FP8 and FP4 weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Size

from model.config import ModelConfig
from model.hf.config_reader import ConfigReader
from model.hf.deepseek_v4 import config as config_json
from model.hf.deepseek_v4 import names
from model.hf.family import ExpertFormat, Family
from model.hf.tensors import Layout, Source
from model.mixers.csa import CompressedSparseAttention
from model.mixers.hca import HeavilyCompressedAttention


class DeepseekV4(Family):
    """Hybrid attention with hyper-connections and hash-routed leading layers."""

    title = "DeepSeek-V4"
    model_type = "deepseek_v4"
    architecture = "DeepseekV4ForCausalLM"
    mixers = config_json.MIXERS
    layouts = ("transformers", "released")
    head = "head.weight"
    has_prediction_module = True
    fields = {  # noqa: RUF012
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
    fixed = {  # noqa: RUF012
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
    needs = {  # noqa: RUF012
        "hyper_connections": True,
        "ffn": "moe",
        "first_k_dense_replace": 0,
        "num_shared_experts": 1,
        "scoring_func": "sqrtsoftplus",
        "n_group": 1,
        "tie_word_embeddings": False,
    }

    def read_fields(self, r: ConfigReader) -> dict[str, Any]:
        return config_json.read_fields(r)

    def other_keys(self) -> Mapping[str, str]:
        return {
            "layers": "compress_ratios",
            "csa_ratio": "compress_rates",
            "hca_ratio": "compress_rates",
            "rope_head_dim": "qk_rope_head_dim",
            "mtp_layers": "num_nextn_predict_layers",
            "yarn_factor": "factor",
            "yarn_original_positions": "original_max_position_embeddings",
        }

    def write_fields(self, config: ModelConfig, layout: Layout, experts: ExpertFormat) -> dict[str, Any]:
        return config_json.write_fields(config, layout, experts)

    def check_expressible(self, config: ModelConfig, layout: Layout) -> None:
        super().check_expressible(config, layout)
        c = config
        self.require(c.swiglu_limit > 0, "swiglu_limit", "a limit above 0", c.swiglu_limit)
        if layout == "released":
            csa, hca = CompressedSparseAttention in c.mixers, HeavilyCompressedAttention in c.mixers
            self.require(not csa or c.csa_ratio == 4, "csa_ratio", "4 in the released layout", c.csa_ratio)
            self.require(not hca or c.hca_ratio != 4, "hca_ratio", "other than 4 in the released layout", c.hca_ratio)
            for key in ("hidden_size", "expert_size"):
                value = getattr(c, key)
                self.require(value % 32 == 0, key, "a multiple of 32, the block of FP4 expert weights", value)

    def detect_layout(self, names_on_disk: Iterable[str]) -> Layout:
        return names.detect_layout(names_on_disk)

    def sources(self, config: ModelConfig, shapes: dict[str, Size], layout: Layout) -> dict[str, Source]:
        return names.sources(shapes, layout)

    def canonical_name(self, name: str) -> str:
        return names.canonical_name(name)

    def drafts(self, names_on_disk: Iterable[str], config: ModelConfig) -> set[str]:
        return {name for name in names_on_disk if name.startswith("mtp.")}
