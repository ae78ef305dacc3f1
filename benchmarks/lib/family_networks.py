"""Small networks of transformers' ``deepseek_v32``, ``mamba2`` and ``kimi_linear`` with odd configurations.

The parity benchmark and the tests compare ours with these.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    KimiLinearConfig,
    KimiLinearForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
)

V32_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "index_topk": 64,
    "index_head_dim": 16,
    "index_n_heads": 32,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
V32_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "as released": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "selection": {"index_topk": 8, "num_hidden_layers": 2},
    "one group, two shared experts": {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "rms_norm_eps": 1e-3},
    "dense": {"first_k_dense_replace": 3},
    "experts only, 3 heads": {
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    },
    "YaRN without mscale": {"rope_parameters": {**YARN, "beta_fast": 16, "beta_slow": 2}},
    "YaRN with two mscales": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
}
MAMBA2_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_heads": 4,
    "head_dim": 16,
    "state_size": 8,
    "n_groups": 2,
    "num_hidden_layers": 2,
    "chunk_size": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MAMBA2_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "two groups": {},
    "one group": {"n_groups": 1, "conv_kernel": 3},
    "tied, without bias": {"tie_word_embeddings": True, "use_conv_bias": False},
    "bounded steps": {"time_step_limit": (0.3, 0.9), "expand": 1, "num_heads": 2},
    "heads of 8, states of 24": {"num_heads": 8, "head_dim": 8, "state_size": 24, "layer_norm_epsilon": 1e-3},
    "convolution over 7 tokens": {"conv_kernel": 7},
    "as many groups as heads": {"n_groups": 4, "conv_kernel": 2, "chunk_size": 64},
}

K, F = "linear_attention", "full_attention"
KIMI_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "linear_head_dim": 16,
    "linear_num_heads": 3,
    "layer_types": [K, F, K],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
KIMI_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "as released": {},
    "latent queries, norm_eps 1e-3": {"q_lora_rank": 24, "rms_norm_eps": 1e-3},
    "groups, two shared experts": {"n_group": 4, "topk_group": 2, "n_shared_experts": 2},
    "kda only, dense": {"layer_types": [K] * 3, "mlp_layer_types": ["dense"] * 3, "linear_conv_kernel_dim": 3},
    "3 latent and 5 linear heads": {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "linear_num_heads": 5,
        "linear_head_dim": 8,
    },
    "latent attention only": {"layer_types": [F] * 3, "mlp_layer_types": ["sparse"] * 3},
}

NETWORKS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "deepseek_v32": (DeepseekV32ForCausalLM, DeepseekV32Config, V32_SIZES),
    "mamba2": (Mamba2ForCausalLM, Mamba2Config, MAMBA2_SIZES),
    "kimi_linear": (KimiLinearForCausalLM, KimiLinearConfig, KIMI_SIZES),
}
"""Class, configuration class and default sizes by ``model_type``."""
CONFIGURATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "deepseek_v32": V32_CONFIGURATIONS,
    "mamba2": MAMBA2_CONFIGURATIONS,
    "kimi_linear": KIMI_CONFIGURATIONS,
}
"""Changes of the default sizes, by ``model_type`` and name."""


def draw(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """Return transformers' network with random weights that give logits of unit scale."""
    network, config, sizes = NETWORKS[model_type]
    options = {} if model_type == "mamba2" else {"attn_implementation": "eager"}
    return randomize(network._from_config(config(**{**sizes, **changes}), **options), seed)


def randomize(network: Any, seed: int = 0) -> Any:
    """Draw all weights such that logits have unit scale and no parameter has a value that hides a mistake."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.endswith(("A_log", "dt_bias")):
                p.uniform_(-2.0, 1.0)
            elif name.endswith("bias"):
                p.normal_(std=0.2)
            elif p.dim() == 1:
                p.normal_(mean=1.0, std=0.2)
            else:
                p.normal_(std=p.shape[-1] ** -0.5)
        for name, buffer in network.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    return network.eval()
