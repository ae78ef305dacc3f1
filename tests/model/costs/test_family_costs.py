"""Published families at a model's width, layers and heads."""

import pytest

from model.config import ModelConfig
from model.costs import (
    COMPARED,
    cache_bytes_per_token,
    costs_of,
    family_config,
    family_costs,
    gqa8_costs,
    ssa_costs,
    v32_costs,
)
from model.errors import ConfigError

MILLION = 1 << 20
FLASH, PRO, TINY = (ModelConfig.from_preset(name) for name in ("v4-flash", "v4-pro", "tiny"))


def parts(costs, tokens, *kinds):
    return {w.part: w.flops for w in costs.work(tokens) if not kinds or w.kind in kinds}


@pytest.mark.parametrize("family", COMPARED)
@pytest.mark.parametrize(
    "config", [FLASH, PRO, TINY, ModelConfig.from_preset("small"), ModelConfig.from_preset("base")]
)
def test_width_layers_heads_and_feed_forward_are_the_models(config, family):
    found = family_config(config, family)
    assert (found.hidden_size, found.num_layers, found.num_heads) == (
        config.hidden_size,
        config.num_layers,
        config.num_heads,
    )
    for mixer, key in (("mamba2", "num_heads"), ("kda", "num_heads")):
        if mixer in found.mixer_options:
            assert found.mixer_options[mixer][key] == config.num_heads
    feed_forward = ("router", "shared experts", "routed experts", "head")
    own, other = (parts(costs_of(each), MILLION) for each in (config, found))
    assert {name: own[name] for name in feed_forward} == {name: other[name] for name in feed_forward}
    assert not found.hyper_connections and not found.mtp_layers


def test_at_the_width_of_v32_it_is_v32():
    """V4-Pro has the width, layers and heads of V3.2."""
    assert family_costs(PRO, "v32").bytes_per_token == 48_068
    released, found = v32_costs(), family_costs(PRO, "v32")
    attention = {name for name in parts(released, MILLION) if name in parts(found, MILLION)} - {"head"}
    kinds = ("index", "core")
    assert parts(released, MILLION, *kinds) == parts(found, MILLION, *kinds)
    for name in ("attention projections", "absorbed latent projections", "index queries and token keys"):
        assert name in attention and parts(released, MILLION)[name] == parts(found, MILLION)[name]


def test_gqa_has_the_cache_of_the_reference():
    for config in (FLASH, PRO):
        assert family_costs(config, "gqa").bytes_per_token == gqa8_costs(config).bytes_per_token


def test_recurrent_families_keep_states():
    mamba2, kimi = family_costs(FLASH, "mamba2"), family_costs(FLASH, "kimi")
    assert mamba2.bytes_per_token == 0
    # States of 64 heads of 128 x 128, three convolved rows, two positions.
    assert sum(mamba2.fixed.values()) == 43 * (4 * (8192 * 128 + 3 * (8192 + 256)) + 16)
    layers = family_config(FLASH, "kimi").layers
    assert (layers.count("kda"), layers.count("mla")) == (32, 11)
    assert kimi.bytes_per_token == 11 * 1152
    assert sum(kimi.fixed.values()) == 32 * (4 * (64 * 128 * 128 + 3 * 3 * 8192) + 16)


@pytest.mark.parametrize("density", [1 / 64.5, 0.25, 1.0])
def test_ssa_has_the_cache_of_gqa_and_a_share_of_its_attention(density):
    dense, ssa = family_costs(FLASH, "gqa"), ssa_costs(FLASH, density)
    for tokens in (1024, MILLION):
        assert ssa.cache_bytes(tokens) == dense.cache_bytes(tokens)
        assert parts(ssa, tokens, "linear") == parts(dense, tokens, "linear")
        core = [sum(parts(each, tokens, "core").values()) for each in (ssa, dense)]
        assert core[0] == pytest.approx(density * core[1])
    assert "assumption" in ssa.name and f"{density:.4g}" in ssa.rule


def test_heads_that_do_not_divide():
    config = TINY.replace(num_heads=6)
    assert family_config(config, "gqa").num_kv_heads == 1
    options = family_config(config, "mamba2").mixer_options["mamba2"]
    assert options["num_heads"] * options["head_dim"] == 2 * config.hidden_size
    assert sum(cache_bytes_per_token(family_config(TINY.replace(num_heads=40), "gqa")).values()) > 0


@pytest.mark.parametrize("name", ["v4", "v5"])
def test_a_family_without_a_rule_is_named(name):
    with pytest.raises(ConfigError, match=f"^'{name}' is not one of v32, mamba2, kimi, gqa$"):
        family_config(TINY, name)
