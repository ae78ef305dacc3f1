"""Named configurations. :mod:`model.depth` scales the published ones."""

from __future__ import annotations

from typing import Any

_RELEASE: dict[str, Any] = {
    # Values common to Flash and Pro (report 4.2.1; the released config.json).
    "vocab_size": 129_280,
    "mtp_layers": 1,
    "max_positions": 1_048_576,
    "head_dim": 512,
    "rope_head_dim": 64,
    "o_lora_rank": 1024,
    "window": 128,
    "yarn_factor": 16.0,
    "yarn_original_positions": 65_536,
    "csa_ratio": 4,
    "hca_ratio": 128,
    "index_heads": 64,
    "index_head_dim": 128,
    "experts_per_token": 6,
    "num_hash_layers": 3,
}

_EXPERTS_OF_V3: dict[str, Any] = {
    # Routing of DeepSeek-V3 and Kimi Linear, on plain residuals without FP4 training.
    "hyper_connections": False,
    "qat": False,
    "scoring_func": "sigmoid",
    "swiglu_limit": 0.0,
    "num_hash_layers": 0,
}
_TINY: dict[str, Any] = {"zero_init_output": True, "init_std": 0.04}
_TINY_BASELINE: dict[str, Any] = {**_TINY, **_EXPERTS_OF_V3}
"""Width, depth, experts and vocabulary of ``tiny``. Mixers take the place of its attention and hyper-connections, such
that the parameters, all and active, differ by less than 3%."""

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "tiny-v32": {
        **_TINY_BASELINE,
        "layers": ("dsa",) * 4,
        "kv_format": "fp8_128",
        "index_format": "fp8_128",
        "index_head_dim": 32,
        "index_topk": 32,  # as many tokens as tiny's 8 entries of 4
        "mixer_options": {"dsa": {"kv_lora_rank": 128}},
    },
    # Within these parameters the published expansion of 2 leaves 16 numbers of state per channel.
    "tiny-mamba2": {
        **_TINY_BASELINE,
        "layers": ("mamba2",) * 4,
        "mixer_options": {"mamba2": {"expand": 1, "head_dim": 32, "state_size": 192}},
    },
    "tiny-kimi": {
        **_TINY_BASELINE,
        "layers": ("kda", "kda", "kda", "mla"),
        "kv_format": "bf16",
        "mixer_options": {
            "kda": {"num_heads": 5, "head_dim": 32},
            "mla": {"q_lora_rank": None, "kv_lora_rank": 128, "rope": False},
        },
    },
    "tiny-gqa": {**_TINY_BASELINE, "layers": ("gqa",) * 4},
    # 35.3M parameters with the byte vocabulary; used by the benchmarks.
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
    "v4-flash": {
        **_RELEASE,
        "hidden_size": 4096,
        "layers": ("sliding", "sliding", *("csa", "hca") * 20, "csa"),
        "num_heads": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "index_topk": 512,
        "num_experts": 256,
        "expert_size": 2048,
        "routed_scaling_factor": 1.5,
    },
    "v4-pro": {
        **_RELEASE,
        "hidden_size": 7168,
        "layers": ("hca", "hca", *("csa", "hca") * 29, "csa"),
        "num_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "index_topk": 1024,
        "num_experts": 384,
        "expert_size": 3072,
        "routed_scaling_factor": 2.5,
    },
    # config.json of deepseek-ai/DeepSeek-V3.2, with the cache formats of its FP8 kernels. Its multi-token prediction
    # module, a layer of its own kind, is not implemented.
    "v3.2": {
        **_EXPERTS_OF_V3,
        "vocab_size": 129_280,
        "hidden_size": 7168,
        "layers": ("dsa",) * 61,
        "max_positions": 163_840,
        "num_heads": 128,
        "yarn_factor": 40.0,
        "yarn_original_positions": 4096,
        "index_heads": 64,
        "index_head_dim": 128,
        "index_topk": 2048,
        "kv_format": "fp8_128",
        "index_format": "fp8_128",
        "mixer_options": {
            "dsa": {
                "q_lora_rank": 1536,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
            }
        },
        "first_k_dense_replace": 3,
        "ffn_size": 18_432,
        "num_experts": 256,
        "experts_per_token": 8,
        "expert_size": 2048,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
    },
    # config.json of state-spaces/mamba2-2.7b and the defaults of its code. num_heads is that of the mixer, for the
    # references of the budget step. There are no positions; max_positions is the longest sequence of a cache.
    "mamba2-2.7b": {
        "vocab_size": 50_288,
        "hidden_size": 2560,
        "layers": ("mamba2",) * 64,
        "max_positions": 1_048_576,
        "norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "num_heads": 80,
        "mixer_options": {
            "mamba2": {"expand": 2, "num_heads": 80, "head_dim": 64, "state_size": 128, "chunk_size": 256}
        },
        "hyper_connections": False,
        "qat": False,
        "ffn": "none",
    },
    # config.json of moonshotai/Kimi-Linear-48B-A3B-Instruct. Of the 27 layers, every fourth one and the last have
    # latent attention.
    "kimi-linear-48b-a3b": {
        **_EXPERTS_OF_V3,
        "vocab_size": 163_840,
        "hidden_size": 2304,
        "layers": (*("kda", "kda", "kda", "mla") * 6, "kda", "kda", "mla"),
        "max_positions": 1_048_576,
        "norm_eps": 1e-5,
        "num_heads": 32,
        "kv_format": "bf16",
        "mixer_options": {
            "kda": {"num_heads": 32, "head_dim": 128},
            "mla": {
                "q_lora_rank": None,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
                "rope": False,
            },
        },
        "first_k_dense_replace": 1,
        "ffn_size": 9216,
        "num_experts": 256,
        "experts_per_token": 8,
        "expert_size": 1024,
        "routed_scaling_factor": 2.446,
    },
}
