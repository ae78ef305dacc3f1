"""The mamba2 mixer: initialization, batch-invariant mode, costs and options of its own."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import native
from model import checkpoint
from model.cache import Cache
from model.config import ModelConfig
from model.costs import (
    cache_bytes_per_token,
    count_parameters,
    decode_work,
    find_ablations,
    find_crossovers,
    waterfall,
)
from model.errors import ConfigError
from model.forward.execution import Execution
from model.mixers.mamba2 import Mamba2
from model.wording import count
from tests.model.networks import EXACT, SMALL, build, random_ids

OPTIONS = SMALL["mixer_options"]["mamba2"]
LAYERS = ("mamba2", "csa", "mamba2", "hca")
HEADS, CONVOLVED = 8, 64 + 2 * 2 * 6
"""Sizes of a layer at :data:`OPTIONS` and a hidden size of 32."""


def network(layers=LAYERS, options=None, **overrides):
    return build(layers=layers, mixer_options={"mamba2": {**OPTIONS, **(options or {})}}, **{**EXACT, **overrides})


# --- training


def test_initial_steps_and_rates_lie_in_their_ranges():
    layer = network(options={"time_step_min": 0.01, "time_step_max": 0.02}).layers[0].attn
    steps = F.softplus(layer.dt_bias.detach())
    assert (steps > 0.0099).all() and (steps < 0.0201).all() and steps.std() > 0
    rates = layer.A_log.detach().exp()
    assert (rates >= 1).all() and (rates <= 16).all() and (layer.D == 1).all()


# --- precision


@pytest.mark.parametrize("natively", [True, False])
@pytest.mark.parametrize("state_format", ["fp32", "bf16"])
@torch.no_grad()
def test_batch_invariant_bits_at_odd_sizes(state_format, natively, monkeypatch):
    """Rows end within vector registers, where PyTorch rounds exp and SiLU differently. A state in BF16 is rounded after
    every token, whatever the pieces."""
    if not natively:
        monkeypatch.setattr(native, "level", lambda: None)
    odd = {"num_heads": 3, "head_dim": 4, "n_groups": 3, "state_size": 5, "state_format": state_format}
    model = network(layers=("mamba2", "mamba2"), options=odd, ffn="dense")
    model.execution = Execution("batch-invariant")
    ids = random_ids(3, 40)
    expected = model(ids)
    for pieces in ([1] * 40, [17, 3, 20]):
        cache = Cache(model.config, 1, 40)
        found = torch.cat([model(piece, cache) for piece in ids[1:2].split(pieces, dim=1)], dim=1)
        assert torch.equal(found, expected[1:2])


# --- costs


def test_flops_and_parameters_are_counted():
    model = network(layers=("mamba2", "mamba2"), ffn="dense")
    config = model.config
    work = {part.part: part.flops for part in decode_work(config, 1 << 20)}
    layer = model.layers[0].attn
    products = 2 * (layer.in_proj.weight.numel() + layer.out_proj.weight.numel())
    assert work["mamba2 projections"] == 2 * products
    assert work["mamba2 convolution"] == 2 * 2 * layer.conv.weight.numel()
    assert work["core state space, mamba2"] == 2 * 4 * HEADS * 8 * 6
    assert decode_work(config, 1) == decode_work(config, 1 << 20)
    assert count_parameters(model).components["attention"][0] == 2 * sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("layers", [("mamba2",), ("mamba2", "csa", "gqa"), LAYERS])
def test_reports_of_costs_cover_recurrent_layers(layers):
    model = network(layers=layers)
    steps = waterfall(model.config)
    recurrent, own = layers.count("mamba2"), sum(cache_bytes_per_token(model.config).values())
    named = {step.name: step for step in steps}
    assert named["recurrent layers"].bytes_per_token == 4096 * (len(layers) - recurrent)
    assert named["recurrent layers"].rule == f"state of a fixed size in {count(recurrent, 'mamba2 layer')}"
    assert steps[-1].bytes_per_token == own and ("the model's own gqa layers" in named) == ("gqa" in layers)
    if own:
        product = math.prod(step.factor for step in steps[1:])
        assert product == pytest.approx(4096 * len(layers) / own)
    assert find_crossovers(model.config) and len(find_ablations(model.config, count_parameters(model), 0)) == 5


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 7}, r"head_dim: expected a divisor of 64 channels, found 7"),
        ({"state_size": 2.5}, r"state_size: expected a whole number of at least 1, found 2\.5"),
        ({"n_groups": 3}, r"n_groups: expected a divisor of 8 heads, found 3"),
        ({"chunk_size": True}, r"chunk_size: expected a whole number of at least 1, found true"),
        ({"use_conv_bias": 1}, r"use_conv_bias: expected true or false, found 1"),
        ({"expand": 0.7}, r"expand: expected a number above 0 that makes .* a whole number, found 0\.7"),
        ({"expand": -1}, r"expand: expected a number above 0"),
        ({"expand": 2, "num_heads": 5}, r"num_heads: expected 64 channels over head_dim 8 .*, found 5"),
        ({"time_step_min": 0}, r"time_step_min: expected a number above 0, found 0"),
        ({"time_step_max": 1e-5}, r"time_step_max: expected a number of at least 0\.001, found 1e-05"),
        ({"time_step_limit": [0.1]}, r"time_step_limit: expected two rising numbers.*found \[0\.1\]"),
        ({"time_step_limit": [0.1, 0.1]}, r"time_step_limit: expected two rising numbers"),
        (
            {"time_step_limit": [0.0, math.inf]},
            r"time_step_limit: .* null for no limit, found \[0\.0, \.inf\]",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=rf"^mixer_options\.mamba2\.{message}"):
        ModelConfig(**{**SMALL, "layers": ("mamba2",), "mixer_options": {"mamba2": {**OPTIONS, **options}}})


def test_heads_come_from_their_number_or_from_the_expansion():
    def shape(**options):
        given = {"mamba2": {**OPTIONS, **options}}
        return Mamba2.shape(ModelConfig(**{**SMALL, "layers": ("mamba2",), "mixer_options": given}))

    assert shape() == shape(expand=2) == shape(num_heads=8) == shape(expand=2.0, num_heads=8)
    assert shape().num_heads == HEADS and shape().convolved == CONVOLVED
    assert shape(expand=1.5).num_heads == 6 and shape(num_heads=10).inner == 80


def test_a_checkpoint_keeps_the_options(tmp_path):
    model = network(options={"time_step_limit": (0.01, 0.5), "state_format": "bf16", "num_heads": 4})
    checkpoint.save(model, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.config == model.config
    assert loaded.config.mixer_options["mamba2"]["time_step_limit"] == [0.01, 0.5]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(random_ids(1, 20)), model(random_ids(1, 20)))
