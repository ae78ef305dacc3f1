"""Released sizes, and tiny networks of equal size."""

import subprocess
import sys

import pytest
import torch

from model.config import ModelConfig
from model.costs import count_parameters
from model.presets import PRESETS
from model.transformer import Transformer

SHARED = {
    "vocab_size": 129_280,
    "head_dim": 512,
    "rope_head_dim": 64,
    "o_lora_rank": 1024,
    "window": 128,
    "csa_ratio": 4,
    "hca_ratio": 128,
    "index_heads": 64,
    "index_head_dim": 128,
    "rope_theta": 10_000.0,
    "compress_rope_theta": 160_000.0,
    "yarn_factor": 16.0,
    "yarn_original_positions": 65_536,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "max_positions": 1_048_576,
    "norm_eps": 1e-6,
    "init_std": 0.02,
    "zero_init_output": False,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "num_shared_experts": 1,
    "experts_per_token": 6,
    "num_hash_layers": 3,
    "swiglu_limit": 10.0,
    "mtp_layers": 1,
    "kv_format": "fp8",
    "rope_format": "bf16",
    "index_format": "fp4",
    "gqa_format": "bf16",
    "qat": True,
    "ffn": "moe",
}
RELEASED = {
    "v4-flash": {
        "hidden_size": 4096,
        "num_heads": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "index_topk": 512,
        "num_experts": 256,
        "expert_size": 2048,
        "routed_scaling_factor": 1.5,
    },
    "v4-pro": {
        "hidden_size": 7168,
        "num_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "index_topk": 1024,
        "num_experts": 384,
        "expert_size": 3072,
        "routed_scaling_factor": 2.5,
    },
}
COMPRESS_RATIOS = {"v4-flash": [0, 0, *[4, 128] * 20, 4], "v4-pro": [128, 128, *[4, 128] * 29, 4]}


def on_meta(config):
    with torch.device("meta"):
        return Transformer(config)


@pytest.mark.parametrize("name", RELEASED)
def test_a_preset_carries_the_released_numbers(name):
    config = ModelConfig.from_preset(name)
    for key, value in {**SHARED, **RELEASED[name]}.items():
        assert getattr(config, key) == value, key
    ratio_of = {"sliding": 0, "csa": 4, "hca": 128}
    assert [ratio_of[mixer] for mixer in config.layers] == COMPRESS_RATIOS[name]
    assert config.num_layers == {"v4-flash": 43, "v4-pro": 61}[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built(name):
    assert all(p.is_meta for p in on_meta(ModelConfig.from_preset(name)).parameters())


@pytest.mark.parametrize("name", ["tiny-v32", "tiny-mamba2", "tiny-kimi", "tiny-gqa"])
def test_a_tiny_network_of_another_family_is_as_large_as_tiny(name):
    tiny, other = ModelConfig.from_preset("tiny"), ModelConfig.from_preset(name)
    for field in ("hidden_size", "num_layers", "num_heads", "vocab_size", "block_ffn_kinds", "num_experts",
                  "experts_per_token", "num_shared_experts", "expert_size", "max_positions", "init_std",
                  "zero_init_output", "window"):  # fmt: skip
        assert getattr(other, field) == getattr(tiny, field), field
    counts = [count_parameters(on_meta(config)) for config in (tiny, other)]
    for part in ("routed experts", "shared experts", "router", "embedding", "head"):
        assert counts[1].components[part] == counts[0].components[part], part
    # Residuals are plain, and tiny's hyper-connections count.
    assert "hyper-connections" in counts[0].components and "hyper-connections" not in counts[1].components
    assert counts[1].total == pytest.approx(counts[0].total, rel=0.03)
    assert counts[1].active == pytest.approx(counts[0].active, rel=0.03)


def test_tiny_v32_selects_as_many_tokens_as_tiny():
    tiny, other = ModelConfig.from_preset("tiny"), ModelConfig.from_preset("tiny-v32")
    assert other.index_topk == tiny.index_topk * tiny.csa_ratio


@pytest.mark.parametrize(
    ("name", "total", "active", "tolerance"),
    [
        # DeepSeek-V3's published 671B, 37B active, and the indexers.
        ("v3.2", 671.9e9, 37e9, 0.015),
        ("mamba2-2.7b", 2.7e9, 2.7e9, 0.002),
        ("kimi-linear-48b-a3b", 48e9, 3e9, 0.04),
    ],
)
def test_parameters_are_the_published_ones(name, total, active, tolerance):
    count = count_parameters(on_meta(ModelConfig.from_preset(name)))
    assert count.total == pytest.approx(total, rel=min(tolerance, 0.025))
    assert count.active == pytest.approx(active, rel=tolerance)


def test_v32_without_and_with_its_prediction_module():
    """The checkpoint's 685B also hold a 62nd layer with a product of 2 * hidden x hidden, three norms, and copies of
    embedding and head."""
    config = ModelConfig.from_preset("v3.2")
    main, longer = (count_parameters(on_meta(c)) for c in (config, config.replace(layers=("dsa",) * 62)))
    assert main.total / 1e9 == pytest.approx(671.88, abs=0.005)
    assert (main.total - main.components["indexers"][0]) / 1e9 == pytest.approx(671.03, abs=0.005)
    hidden, vocabulary = config.hidden_size, config.vocab_size
    module = longer.total - main.total + 2 * hidden**2 + 3 * hidden + 2 * vocabulary * hidden
    assert (main.total + module) / 1e9 == pytest.approx(685.4, abs=0.5)
    assert round(main.active / 1e9) == 37


def test_models_on_the_meta_device_do_not_import_the_compiler():
    """Importing torch._dynamo takes seconds, which every start of a server would wait for."""
    code = "import sys; from model.config import ModelConfig as C; from model.transformer import Transformer as T; "
    code += "T.on_meta(C()); print('torch._dynamo' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
