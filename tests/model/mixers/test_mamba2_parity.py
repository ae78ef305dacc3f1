"""Parity of the mamba2 layer with transformers' ``Mamba2Mixer``, whose PyTorch form runs on a CPU.

transformers applies ``time_step_limit`` in its chunked form but not when it decodes a single token. The tests therefore
compare all cached outputs with its chunked form, over the whole sequence.
"""

import functools

import pytest
import torch
import transformers
from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

from model.config import ModelConfig
from model.mixers.mamba2 import Mamba2
from tests.model.mixers.recurrent_parity import PROMPT, TOKENS, Pair

transformers.utils.logging.set_verbosity_error()
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 17, 63, 64, 65, 129, TOKENS]
GRADIENT_LENGTHS = [3, 23, 150]
"""A first token decays nothing, and D only scales it, which the norm undoes where it covers one head: alone, it gives A
and D no gradient."""
CONFIGURATIONS = {
    "one group": {"hidden_size": 24, "head_dim": 8, "state_size": 5, "chunk_size": 7},
    "groups, two taps": {"hidden_size": 20, "head_dim": 5, "n_groups": 4, "state_size": 3, "conv_kernel": 2},
    "a group per head": {
        **{"hidden_size": 15, "head_dim": 10, "n_groups": 3},
        **{"state_size": 16, "conv_kernel": 3, "chunk_size": 1},
    },
    "no bias, expand 1": {
        **{"hidden_size": 21, "expand": 1, "head_dim": 3, "n_groups": 7},
        **{"state_size": 9, "conv_kernel": 5, "use_conv_bias": False, "chunk_size": 256},
    },
    "limited steps": {
        **{"hidden_size": 18, "head_dim": 12, "n_groups": 3},
        **{"state_size": 11, "time_step_limit": [0.02, 0.3]},
    },
    "one head, one number": {"hidden_size": 17, "head_dim": 34, "state_size": 1, "chunk_size": 33},
    "wide state, long steps": {
        **{"hidden_size": 6, "expand": 3, "head_dim": 2},
        **{"state_size": 70, "time_step_min": 0.5, "time_step_max": 20.0},
    },
}


OPTIONS = (
    "head_dim",
    "state_size",
    "n_groups",
    "conv_kernel",
    "use_conv_bias",
    "time_step_min",
    "time_step_max",
)
"""Options of the same name and meaning in transformers."""


def our_names(weights):
    """Return tensors under transformers' names as those of our layer."""
    renamed = {name.replace("conv1d.", "conv."): tensor for name, tensor in weights.items()}
    return renamed | {"conv.weight": renamed["conv.weight"].squeeze(1)}


@functools.cache
def pair(name, batch=1):
    torch.manual_seed(sorted(CONFIGURATIONS).index(name))
    options = dict(CONFIGURATIONS[name])
    hidden = options.pop("hidden_size")
    config = ModelConfig(
        hidden_size=hidden, layers=("mamba2",), norm_eps=1e-5, mixer_options={"mamba2": options}, num_hash_layers=0
    )
    o = config.mixer_options["mamba2"]
    least, most = o["time_step_limit"]
    oracle_config = Mamba2Config(
        hidden_size=hidden,
        expand=o["expand"] or 2,
        num_heads=Mamba2.shape(config).num_heads,
        chunk_size=8,
        time_step_limit=(least, float("inf") if most is None else most),
        layer_norm_epsilon=1e-5,
        num_hidden_layers=1,
        **{key: o[key] for key in OPTIONS},
    )
    oracle, ours = Mamba2Mixer(oracle_config, 0), Mamba2(config, 0)
    with torch.no_grad():
        for p in oracle.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return Pair(config, ours, oracle_config, oracle, our_names, batch)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_outputs_and_gradients_agree(name):
    pair(name).check(LENGTHS, (0, 37), PROMPT, range(1, PROMPT), GRADIENT_LENGTHS)


def test_two_sequences_at_once():
    pair("groups, two taps", batch=2).check([1, 40, 133], (), 133, range(16, 133, 29), ())


def test_decoding_agrees_with_the_cache_of_transformers():
    pair("a group per head").check_caches()


def test_the_limits_of_the_step_size_are_reached():
    p = pair("limited steps")
    projected = p.ours.project(p.x, None, p.context(TOKENS), False)
    for limit in p.config.mixer_options["mamba2"]["time_step_limit"]:
        assert 0.005 < (projected.dt == limit).float().mean() < 0.9


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_length_and_every_cut(name):
    pair(name).check(range(1, TOKENS + 1), (0,), TOKENS, range(1, TOKENS), (*range(3, TOKENS, 13), TOKENS))
