"""Names and keys that DeepSeek-V3.2 and Kimi Linear share: latent attention, and experts after leading dense layers."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.hf.config_reader import ConfigReader
from model.hf.family import Family
from model.hf.name_table import parse_names

MODEL = parse_names("""
    embed.  model.embed_tokens.
    norm.   model.norm.
    head.   lm_head.
""")
LATENT_ATTENTION = parse_names("""
    attn.wq.       self_attn.q_proj.
    attn.wq_a.     self_attn.q_a_proj.
    attn.q_norm.   self_attn.q_a_layernorm.
    attn.wq_b.     self_attn.q_b_proj.
    attn.wkv_a.    self_attn.kv_a_proj_with_mqa.
    attn.kv_norm.  self_attn.kv_a_layernorm.
    attn.wkv_b.    self_attn.kv_b_proj.
    attn.wo.       self_attn.o_proj.
""")
NORMS = parse_names("""
    attn_norm.  input_layernorm.
    ffn_norm.   post_attention_layernorm.
""")


def feed_forward(experts: str) -> dict[str, tuple[str, str]]:
    """Return the names of a layer's dense block, router and shared experts. ``experts`` is the module of a mixture of
    experts."""
    return parse_names(f"""
        ffn.w1.          mlp.gate_proj.
        ffn.w3.          mlp.up_proj.
        ffn.w2.          mlp.down_proj.
        ffn.router.      {experts}.gate.
        ffn.router_bias  {experts}.gate.e_score_correction_bias
        ffn.shared.w1.   {experts}.shared_experts.gate_proj.
        ffn.shared.w3.   {experts}.shared_experts.up_proj.
        ffn.shared.w2.   {experts}.shared_experts.down_proj.
    """)


SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
"""Options of latent attention, which have the same names as the keys."""


def read_feed_forward(r: ConfigReader, layers: int, default_dense: int) -> dict[str, Any]:
    """Return the kinds of feed-forward blocks from ``mlp_layer_types`` or ``first_k_dense_replace``."""
    if r.integer("moe_layer_freq", default=1) != 1:
        raise r.wrong("moe_layer_freq", "1", r.content["moe_layer_freq"])
    if r.has("mlp_layer_types"):
        dense = r.leading("mlp_layer_types", layers, "dense", "sparse")
    else:
        dense = min(r.integer("first_k_dense_replace", default_dense), layers)
    if dense == layers:
        return {"ffn": "dense"}
    return {"ffn": "moe", "first_k_dense_replace": dense, "num_hash_layers": 0}


def write_feed_forward(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of :func:`read_feed_forward`."""
    kinds = config.ffn_kinds
    return {
        "mlp_layer_types": ["dense" if kind == "dense" else "sparse" for kind in kinds],
        "first_k_dense_replace": kinds.count("dense"),
    }


def check_keys(r: ConfigReader) -> None:
    """Check that weights are not quantized and that all heads have keys and values of their own."""
    r.refuse_quantization()
    heads = r.integer("num_attention_heads")
    if r.integer("num_key_value_heads", heads) != heads:
        raise r.wrong("num_key_value_heads", f"{heads} as in 'num_attention_heads'", r.content["num_key_value_heads"])


def check_feed_forward(family: Family, config: ModelConfig) -> None:
    """Raise ConfigError unless the format has the feed-forward blocks of the network."""
    family.require(config.ffn != "none", "ffn", "'moe' or 'dense'", config.ffn)
    family.require(config.num_shared_experts >= 1, "num_shared_experts", "at least 1", config.num_shared_experts)
