"""The kda mixer: initialization, chunks, batch-invariant mode, costs and options of its own."""

import pytest
import torch
import torch.nn.functional as F

from model.cache import Cache
from model.config import ModelConfig
from model.costs import count_parameters, decode_work, waterfall
from model.errors import ConfigError
from model.forward.context import Context
from model.forward.execution import TOKEN_TILE, Execution
from model.mixers.kda import KimiDeltaAttention
from tests.model.networks import EXACT, SMALL, build, random_ids

OPTIONS = SMALL["mixer_options"]["kda"]
LAYERS = ("kda", "csa", "kda", "hca")
HEADS, HEAD_DIM = 4, 8
"""Sizes of a layer at :data:`OPTIONS` and a hidden size of 32."""
MATRICES = {"in_proj.weight", "decay_proj.weight", "gate_proj.weight", "out_proj.weight"}


def network(layers=LAYERS, options=None, **overrides):
    given = {**SMALL["mixer_options"], "kda": {**OPTIONS, **(options or {})}}
    return build(layers=layers, mixer_options=given, **{**EXACT, **overrides})


# --- training


def test_initial_steps_and_rates_lie_in_the_published_ranges():
    layer = network(layers=("kda",) * 3).layers[1].attn
    steps, rates = F.softplus(layer.dt_bias.detach()), layer.A_log.detach().exp()
    assert (steps > 0.00099).all() and (steps < 0.101).all() and steps.std() > 0
    assert (rates >= 1).all() and (rates <= 16).all() and rates.std() > 0


def test_gradients_do_not_depend_on_the_chunk_size():
    ids, found = random_ids(2, 45), []
    for chunk in (1, 4, 32, 128):
        model = network(layers=("kda",), options={"chunk_size": chunk}).train()
        model(ids).square().mean().backward()
        found.append([p.grad for p in model.layers[0].attn.parameters()])
    for gradients in found[1:]:
        for ours, expected in zip(gradients, found[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


# --- precision


@pytest.mark.parametrize(
    "options", [{}, {"state_format": "bf16"}, {"num_heads": 3, "head_dim": 4}, {"num_heads": 1, "head_dim": 4}]
)
@torch.no_grad()
def test_batch_invariant_bits_do_not_depend_on_pieces_or_other_sequences(options):
    model = network(options=options)
    model.execution = Execution("batch-invariant")
    ids = random_ids(3, 40)
    expected = model(ids)
    for pieces in ([1] * 40, [17, 3, 20]):
        cache = Cache(model.config, 1, 40)
        found = torch.cat([model(piece, cache) for piece in ids[1:2].split(pieces, dim=1)], dim=1)
        assert torch.equal(found, expected[1:2])


@pytest.mark.parametrize("heads", [1, 2, 3, 5])
@torch.no_grad()
def test_projections_do_not_depend_on_the_position_in_a_tile(heads):
    layer = network(options={"num_heads": heads, "head_dim": 4}).layers[0].attn
    context = Context(torch.zeros(1, 1, dtype=torch.int64), {}, execution=Execution("batch-invariant"))
    for _ in range(10):
        x, order = torch.randn(1, TOKEN_TILE, 32), torch.randperm(TOKEN_TILE)
        found, expected = (layer.project(tile, None, context, cached=True) for tile in (x[:, order], x))
        assert all(torch.equal(a, b[:, order]) for a, b in zip(found, expected, strict=True))


# --- costs


def test_flops_and_parameters_are_counted():
    model = network(layers=("kda", "kda"), ffn="dense")
    config = model.config
    work = {part.part: part.flops for part in decode_work(config, 1 << 20)}
    layer = model.layers[0].attn
    products = 2 * sum(p.numel() for name, p in layer.named_parameters() if name in MATRICES)
    assert work["kda projections"] == 2 * products
    assert work["kda convolution"] == 2 * 2 * layer.conv.weight.numel()
    assert work["core delta rule, kda"] == 2 * 6 * HEADS * HEAD_DIM * HEAD_DIM
    assert decode_work(config, 1) == decode_work(config, 1 << 20)
    assert count_parameters(model).components["attention"][0] == 2 * sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("layers", [("kda",), ("kda", "csa", "mamba2"), LAYERS])
def test_the_waterfall_covers_recurrent_layers(layers):
    steps = {step.name: step for step in waterfall(network(layers=layers).config)}
    growing = len([name for name in layers if name not in ("kda", "mamba2")])
    assert steps["recurrent layers"].bytes_per_token == 4096 * growing


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 5}, r"head_dim: expected a divisor of hidden_size 32 because num_heads is not given, found 5"),
        ({"head_dim": 64}, r"head_dim: expected a divisor of hidden_size 32 because num_heads is not given, found 64"),
        ({"chunk_size": 24}, r"chunk_size: expected a power of two, found 24"),
        ({"chunk_size": True}, r"chunk_size: expected a power of two, found true"),
        ({"chunk_size": 0}, r"chunk_size: expected a power of two, found 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=rf"^mixer_options\.kda\.{message}"):
        ModelConfig(**{**SMALL, "layers": ("kda",), "mixer_options": {"kda": {**OPTIONS, **options}}})


def test_heads_come_from_their_number_or_from_the_width():
    def heads(**options):
        given = {"kda": {**OPTIONS, **options}}
        return KimiDeltaAttention.heads(ModelConfig(**{**SMALL, "layers": ("kda",), "mixer_options": given}))

    assert heads() == heads(num_heads=4) == (HEADS, HEAD_DIM)
    assert heads(num_heads=3, head_dim=5) == (3, 5)
