"""Small networks with random parameters, for tests."""

import torch

from model.config import CACHE_FORMATS, ModelConfig
from model.transformer import Transformer

LATENT = {"q_lora_rank": 16, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
SMALL = {
    "hidden_size": 32,
    "head_dim": 16,
    "rope_head_dim": 8,
    "num_heads": 4,
    "q_lora_rank": 16,
    "o_lora_rank": 8,
    "window": 6,
    "hca_ratio": 12,
    "index_heads": 8,
    "index_head_dim": 8,
    "index_topk": 3,
    "expert_size": 16,
    "init_std": 0.2,
    "max_positions": 512,
    "vocab_size": 50,
    "mixer_options": {
        "mla": LATENT,
        "dsa": LATENT,
        "mamba2": {"head_dim": 8, "state_size": 6, "n_groups": 2, "chunk_size": 8},
        "kda": {"head_dim": 8, "chunk_size": 8},
    },
}

FP32 = dict.fromkeys(CACHE_FORMATS, "fp32")
BF16 = dict.fromkeys(CACHE_FORMATS, "bf16")
EXACT = {**FP32, "qat": False}
"""Settings without any quantization."""


def build(seed=0, **overrides):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{**SMALL, **overrides}))
    with torch.no_grad():  # parameters initialized to zero would hide mistakes
        for name, p in model.named_parameters():
            if name.endswith((".sink", ".ape", ".base", ".scale")):
                p.normal_(std=0.5)
    return model.eval()


def random_ids(*shape, seed=1):
    """Return token IDs of :data:`SMALL`'s vocabulary."""
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def stored_rows(entries):
    """Return the rows of a growing cache part: uint8 [B, T, nbytes], where T is the highest count. Rows past a
    sequence's count repeat its last one."""
    return entries.pages.gather_range(0, max(entries.counts), torch.tensor(entries.counts))
