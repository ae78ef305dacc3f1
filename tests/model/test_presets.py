"""Released sizes, and scaling by depth."""

import itertools

import pytest
import torch

from model.cache import Cache
from model.config import ModelConfig
from model.costs import cache_bytes_per_token, count_parameters
from model.errors import ConfigError
from model.presets import MAX_DEPTH, MIN_DEPTH, PRESETS
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
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_preset(name))
    assert all(p.is_meta for p in model.parameters())


def test_depth_43_is_flash():
    assert ModelConfig.from_depth(43) == ModelConfig.from_preset("v4-flash")
    assert ModelConfig.from_dict({"depth": 43, "window": 64}) == ModelConfig.from_preset("v4-flash", window=64)


DEPTHS = range(MIN_DEPTH, MAX_DEPTH + 1)


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_depth_keeps_the_proportions(depth):
    c = ModelConfig.from_depth(depth)
    assert c.num_layers == depth
    csa, hca, sliding = (c.layers.count(mixer) for mixer in ("csa", "hca", "sliding"))
    assert sliding in (1, 2) and c.layers[:sliding] == ("sliding",) * sliding
    assert c.layers[sliding:] == ("csa", "hca") * hca + ("csa",) and csa == hca + 1
    # Multiples of block and tile sizes.
    assert c.hidden_size % 128 == 0 and c.q_lora_rank % 32 == 0 and c.expert_size % 64 == 0
    assert c.index_topk % 16 == 0 and c.index_heads % 8 == 0 and c.num_experts % 8 == 0
    assert c.head_dim in (64, 128, 256, 512) and c.window == c.hca_ratio == 128
    assert c.rope_head_dim * 8 == c.index_head_dim * 4 == c.head_dim
    assert c.num_heads == 8 * c.o_groups and 8 * c.head_dim == 4 * c.o_lora_rank
    assert 0.85 <= c.num_heads * c.head_dim / (8 * c.hidden_size) <= 1.15
    assert 5 <= c.num_experts / depth <= 7 and c.experts_per_token <= c.num_experts / 8 + 1
    assert 85 <= c.hidden_size / depth <= 105


def test_sizes_grow_with_depth():
    names = ("hidden_size", "head_dim", "q_lora_rank", "index_heads", "index_topk", "num_experts", "expert_size")
    configs = [ModelConfig.from_depth(depth) for depth in DEPTHS]
    for less, more in itertools.pairwise(configs):
        assert all(getattr(less, name) <= getattr(more, name) for name in names)
        assert less.num_heads * less.head_dim <= more.num_heads * more.head_dim
        assert less.experts_per_token <= more.experts_per_token and less.num_hash_layers <= more.num_hash_layers
        assert sum(cache_bytes_per_token(less).values()) <= sum(cache_bytes_per_token(more).values())
    with torch.device("meta"):
        counts = [count_parameters(Transformer(config)) for config in configs[::6]]
    for few, many in itertools.pairwise(counts):
        assert few.total < many.total and few.active < many.active


def test_every_derived_number_can_be_overridden():
    plain = ModelConfig.from_depth(12)
    changed = {"hidden_size": 256, "vocab_size": 258, "layers": ["csa"] * 12, "num_experts": 8, "yarn_factor": 1.0}
    config = ModelConfig.from_depth(12, **changed)
    assert config == plain.replace(**{**changed, "layers": ("csa",) * 12})


def test_the_smallest_member_runs():
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_depth(MIN_DEPTH, vocab_size=64, num_experts=8)).eval()
    ids = torch.randint(64, (1, 140))
    with torch.inference_mode():
        whole = model(ids)
        cache = Cache(model.config, 1, 140)
        pieces = torch.cat((model(ids[:, :139], cache), model(ids[:, 139:], cache)), dim=1)
    assert whole.isfinite().all()
    torch.testing.assert_close(pieces, whole, atol=1e-3, rtol=1e-4)  # borderline values may round either way


def test_a_depth_that_could_change_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"^depth: 8 has no effect"):
        ModelConfig.from_dict({**ModelConfig().to_dict(), "depth": 8})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 3}, "depth: expected a whole number from 4 to 61, found 3"),
        ({"depth": 62}, "depth: expected a whole number from 4 to 61, found 62"),
        ({"depth": "12"}, "depth: expected a whole number from 4 to 61, found '12'"),
        ({"depth": True}, "depth: expected a whole number from 4 to 61, found True"),
        ({"depth": 12, "preset": "tiny"}, "depth: 12 and preset 'tiny' are mutually exclusive"),
        ({"depth": 12, "window": 0}, "window: must be at least 1, found 0"),
        ({"preset": "v5"}, "preset: unknown preset 'v5'; there are tiny, small, base, v4-flash, v4-pro"),
    ],
)
def test_a_wrong_starting_point_is_named(values, message):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(values)
    assert str(error.value) == message
