"""Scaling by depth."""

import itertools

import pytest
import torch

from model.cache import Cache
from model.config import ModelConfig
from model.costs import cache_bytes_per_token, count_parameters
from model.depth import FAMILIES
from model.errors import ConfigError
from model.transformer import Transformer


def test_depth_43_is_flash():
    assert ModelConfig.from_depth(43) == ModelConfig.from_preset("v4-flash")
    assert ModelConfig.from_dict({"depth": 43, "window": 64}) == ModelConfig.from_preset("v4-flash", window=64)


DEPTHS = FAMILIES["v4"].depths


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


@pytest.mark.parametrize(
    ("family", "depth", "preset"),
    [("v32", 61, "v3.2"), ("mamba2", 64, "mamba2-2.7b"), ("kimi", 27, "kimi-linear-48b-a3b")],
)
def test_the_deepest_network_is_the_released_one(family, depth, preset):
    assert FAMILIES[family].depths[-1] == depth
    assert ModelConfig.from_depth(depth, family) == ModelConfig.from_preset(preset)
    config = ModelConfig.from_dict({"depth": depth, "family": family, "window": 64})
    assert config == ModelConfig.from_preset(preset, window=64)


def test_32_layers_of_gqa_are_as_large_as_llama_3_8b():
    config = ModelConfig.from_depth(32, "gqa")
    with torch.device("meta"):
        count = count_parameters(Transformer(config))
    assert count.total / 1e9 == pytest.approx(8.03, abs=0.005)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.ffn_size) == (32, 8, 128, 14_336)


@pytest.mark.parametrize("family", ["v32", "mamba2", "kimi", "gqa"])
def test_every_depth_of_a_family_can_be_built_and_grows(family):
    configs = [ModelConfig.from_depth(depth, family) for depth in FAMILIES[family].depths]
    for depth, config in zip(FAMILIES[family].depths, configs):
        assert config.num_layers == depth and config.hidden_size % 128 == 0
        assert set(config.layers) == set(configs[-1].layers)
    for less, more in itertools.pairwise(configs):
        for name in ("hidden_size", "num_experts", "expert_size", "ffn_size", "index_topk", "head_dim"):
            assert getattr(less, name) <= getattr(more, name), name
    with torch.device("meta"):
        counts = [count_parameters(Transformer(config)) for config in configs[::7]]
    for few, many in itertools.pairwise(counts):
        assert few.total < many.total and few.active < many.active


def test_kimi_has_latent_attention_in_every_fourth_and_in_the_last_layer():
    for depth in FAMILIES["kimi"].depths:
        layers = ModelConfig.from_depth(depth, "kimi").layers
        assert [n for n, name in enumerate(layers, 1) if name == "mla"] == sorted({*range(4, depth + 1, 4), depth})


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
    model = Transformer(ModelConfig.from_depth(DEPTHS[0], vocab_size=64, num_experts=8)).eval()
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
        ({"depth": True}, "depth: expected a whole number from 4 to 61, found true"),
        ({"depth": 12, "preset": "tiny"}, "depth: 12 and preset 'tiny' are mutually exclusive"),
        ({"depth": 12, "window": 0}, "window: must be at least 1, found 0"),
        (
            {"preset": "v5"},
            "preset: unknown preset 'v5'; there are tiny, tiny-v32, tiny-mamba2, tiny-kimi, tiny-gqa, small, "
            "base, v4-flash, v4-pro, v3.2, mamba2-2.7b, kimi-linear-48b-a3b",
        ),
        ({"family": "v32"}, "family: 'v32' is scaled by depth, which is not given"),
        ({"family": "v32", "preset": "tiny"}, "family: 'v32' is scaled by depth, which is not given"),
        ({"family": "v5", "depth": 8}, "family: expected one of v4, v32, mamba2, kimi, gqa, found 'v5'"),
        ({"family": ["v32"], "depth": 8}, "family: expected one of v4, v32, mamba2, kimi, gqa, found ['v32']"),
        (
            {"family": "kimi", "depth": 28},
            "depth: expected a whole number from 4 to 27 for family 'kimi', found 28",
        ),
        (
            {"family": "kimi", "depth": 8, "preset": "tiny"},
            "depth: 8 and preset 'tiny' are mutually exclusive",
        ),
    ],
)
def test_a_wrong_starting_point_is_named(values, message):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(values)
    assert str(error.value) == message
