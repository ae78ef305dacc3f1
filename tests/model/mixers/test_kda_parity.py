"""Parity of the kda layer with transformers' ``KimiLinearDeltaAttention``, whose PyTorch form runs on a CPU."""

import functools

import pytest
import torch
import transformers
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearConfig, KimiLinearDeltaAttention

from model.config import ModelConfig
from model.mixers.kda import KimiDeltaAttention
from tests.model.mixers.recurrent_parity import PROMPT, TOKENS, Pair

transformers.utils.logging.set_verbosity_error()
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 17, 31, 32, 33, 63, 64, 65, 129, TOKENS]
CONFIGURATIONS = {
    "two heads": {"hidden_size": 24, "num_heads": 2, "head_dim": 8},
    "one head, one channel": {"hidden_size": 7, "num_heads": 1, "head_dim": 1, "conv_kernel": 2},
    "heads from the width": {"hidden_size": 30, "head_dim": 6, "chunk_size": 8},
    "more channels than the width": {"hidden_size": 10, "num_heads": 5, "head_dim": 9, "conv_kernel": 3},
    "long filters, small chunks": {
        "hidden_size": 21,
        "num_heads": 3,
        "head_dim": 11,
        "conv_kernel": 7,
        "chunk_size": 1,
    },
    "long chunks": {"hidden_size": 17, "num_heads": 1, "head_dim": 34, "chunk_size": 128},
    "strong decays": {"hidden_size": 18, "num_heads": 3, "head_dim": 5, "chunk_size": 64},
}
SPREAD = {"strong decays": 6.0}
"""Multiplies A_log and dt_bias: some decays are nearly 1, others exp of minus hundreds."""


def our_names(weights):
    """Return tensors under transformers' names as those of our layer."""
    stacked = ("q_proj", "k_proj", "v_proj", "forget_gate.f_a_proj", "g_a_proj", "b_proj")
    return {
        "in_proj.weight": torch.cat([weights[f"{name}.weight"] for name in stacked]),
        "conv.weight": weights["conv1d.weight"].flatten(1),
        "decay_proj.weight": weights["forget_gate.f_b_proj.weight"],
        "gate_proj.weight": weights["g_b_proj.weight"],
        "A_log": weights["forget_gate.A_log"].flatten(),
        "dt_bias": weights["forget_gate.dt_bias"],
        "norm.weight": weights["o_norm.weight"],
        "out_proj.weight": weights["o_proj.weight"],
    }


@functools.cache
def pair(name, batch=1):
    torch.manual_seed(sorted(CONFIGURATIONS).index(name))
    options = dict(CONFIGURATIONS[name])
    hidden = options.pop("hidden_size")
    config = ModelConfig(
        hidden_size=hidden, layers=("kda",), norm_eps=1e-5, mixer_options={"kda": options}, num_hash_layers=0
    )
    heads, head_dim = KimiDeltaAttention.heads(config)
    oracle_config = KimiLinearConfig(
        hidden_size=hidden,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_heads=heads,
        linear_head_dim=head_dim,
        linear_conv_kernel_dim=config.mixer_options["kda"]["conv_kernel"],
        rms_norm_eps=1e-5,
    )
    oracle, ours = KimiLinearDeltaAttention(oracle_config, 0), KimiDeltaAttention(config, 0)
    with torch.no_grad():
        for key, p in oracle.named_parameters():
            p.normal_(std=0.5 if p.dim() == 1 else p.shape[-1] ** -0.5)
            if key.startswith("forget_gate") and p.squeeze().dim() < 2:
                p.mul_(SPREAD.get(name, 1.0))
        oracle.o_norm.weight.add_(1.0)
        oracle.conv1d.weight.normal_(std=0.5)
    return Pair(config, ours, oracle_config, oracle, our_names, batch)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_outputs_and_gradients_agree(name):
    pair(name).check(LENGTHS, (0, 37), PROMPT, range(1, PROMPT), (1, 23, 150))


def test_two_sequences_at_once():
    pair("more channels than the width", batch=2).check([1, 40, 133], (), 133, range(16, 133, 29), ())


def test_decoding_agrees_with_the_cache_of_transformers():
    pair("two heads").check_caches()


@torch.no_grad()
def test_strong_decays_are_strong():
    p, mild = pair("strong decays"), pair("two heads")
    projected = p.ours.project(p.x, None, p.context(TOKENS), False)
    assert projected.log_decay.min() < -200 and (projected.log_decay > -0.01).float().mean() > 0.1
    projected = mild.ours.project(mild.x, None, mild.context(TOKENS), False)
    assert -1 < projected.log_decay.median() < -0.1


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_length_and_every_cut(name):
    pair(name).check(range(1, TOKENS + 1), (0,), TOKENS, range(1, TOKENS), (*range(1, TOKENS, 13), TOKENS))
