"""Options of mixers, with and without a layer of the mixer."""

import pytest

from model.config import ModelConfig
from model.errors import ConfigError
from model.mixers import MIXERS
from model.presets import PRESETS

WRONG = [
    ("gqa", "conv_kernel", "abc"),
    ("kda", "head_dim", 0),
    ("kda", "chunk_size", 3),
    ("mamba2", "expand", "x"),
    ("mamba2", "state_format", "fp8"),
    ("mla", "rope", 3),
    ("mla", "qk_rope_head_dim", -2),
    ("dsa", "kv_lora_rank", None),
]


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize(("mixer", "option", "value"), WRONG)
def test_a_value_that_no_schedule_allows_is_refused_also_without_a_layer(mixer, option, value, used):
    layers = [mixer] if used else ["sliding"]
    with pytest.raises(ConfigError, match=rf"^mixer_options\.{mixer}\.{option}: expected .*found"):
        ModelConfig(layers=layers, num_hash_layers=0, mixer_options={mixer: {option: value}})


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_whose_layers_are_replaced_keeps_no_options_and_is_valid(preset, mixer):
    config = ModelConfig.from_preset(preset, layers=[mixer], num_hash_layers=0, first_k_dense_replace=0)
    assert set(config.mixer_options) <= {mixer}


def test_values_that_only_contradict_other_fields_are_dropped_without_a_layer():
    options = {"kda": {"head_dim": 96}, "mamba2": {"time_step_min": 0.5}, "mla": {"qk_rope_head_dim": 0}}
    for mixer, values in options.items():
        assert ModelConfig(layers=["sliding"], num_hash_layers=0, mixer_options={mixer: values}).mixer_options == {}
        with pytest.raises(ConfigError, match=rf"^mixer_options\.{mixer}\."):
            ModelConfig(layers=[mixer], num_hash_layers=0, mixer_options={mixer: values})
