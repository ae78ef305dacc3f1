"""The mamba2 mixer in a network: training, caches of fixed size, batch-invariant mode, costs and options."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import native
from model import checkpoint
from model.cache import Cache
from model.cache.file import restore_cache, save_cache
from model.cache.pages import PagePool
from model.cache.parts import RecurrentPart
from model.config import ModelConfig
from model.costs import (
    cache_bytes_per_token,
    count_parameters,
    decode_work,
    find_ablations,
    find_crossovers,
    fixed_state_bytes,
    waterfall,
)
from model.distributed.fsdp import sharded_names
from model.errors import CacheError, ConfigError
from model.forward.aux_outputs import AuxOutputs
from model.forward.execution import Execution
from model.generation import generate
from model.mixers.mamba2 import Mamba2
from model.optim import MuonAdamW, OptimizerConfig
from model.precision import format_table
from tests.model.networks import EXACT, SMALL, build

OPTIONS = SMALL["mixer_options"]["mamba2"]
LAYERS = ("mamba2", "csa", "mamba2", "hca")
HEADS, CONVOLVED = 8, 64 + 2 * 2 * 6
"""Sizes of a layer at :data:`OPTIONS` and a hidden size of 32."""


def network(layers=LAYERS, options=None, **overrides):
    return build(layers=layers, mixer_options={"mamba2": {**OPTIONS, **(options or {})}}, **{**EXACT, **overrides})


def random_ids(*shape, seed=1):
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


# --- training


def test_every_parameter_trains_under_the_rule_of_its_role():
    model = network(mtp_layers=1).train()
    optimizer = MuonAdamW(model.named_parameters(), OptimizerConfig(learning_rate=3e-3), model.split_sizes())
    rules = {name: group["rule"] for group in optimizer.param_groups for name in group["names"]}
    own = {name.removeprefix("layers.0.attn."): rule for name, rule in rules.items() if "layers.0.attn." in name}
    assert {name for name, rule in own.items() if rule == "muon"} == {"in_proj.weight", "out_proj.weight"}
    assert {"conv.weight", "conv.bias", "A_log", "D", "dt_bias", "norm.weight"} < set(own)
    assert model.split_sizes()["layers.0.attn.in_proj.weight"] == (64, 64, 12, 12, HEADS)
    ids, losses = random_ids(2, 40), []
    for _ in range(4):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        for name, p in model.layers[0].attn.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_filters_rates_skips_and_steps_do_not_decay():
    model = network()
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = MuonAdamW(model.named_parameters(), config, model.split_sizes())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    layer = {name.removeprefix("layers.0.attn.") for name in moved if name.startswith("layers.0.attn.")}
    assert layer == {"in_proj.weight", "out_proj.weight"} and "embed.weight" in moved


def test_convolutions_stay_whole_where_matrices_are_sharded():
    names = sharded_names(network())
    assert "layers.0.attn.in_proj.weight" in names and "layers.0.attn.out_proj.weight" in names
    assert not any(".conv." in name for name in names)


def test_autocast_keeps_the_recurrence_in_float32():
    model = network(layers=("mamba2",), ffn="dense").train()
    ids = random_ids(2, 90)
    expected = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids)
    assert (found - expected).abs().max() < 0.1 * expected.std()
    found.square().mean().backward()
    for name, p in model.layers[0].attn.named_parameters():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name


def test_an_initial_step_lies_between_its_limits():
    layer = network(options={"time_step_min": 0.01, "time_step_max": 0.02}).layers[0].attn
    steps = F.softplus(layer.dt_bias.detach())
    assert (steps > 0.0099).all() and (steps < 0.0201).all() and steps.std() > 0
    rates = layer.A_log.detach().exp()
    assert (rates >= 1).all() and (rates <= 16).all() and (layer.D == 1).all()


# --- caches


@pytest.mark.parametrize("pieces", [[70], [1] * 70, [17, 1, 9, 30, 13], [33, 37]])
@torch.no_grad()
def test_cached_pieces_equal_the_full_pass(pieces):
    model, ids = network(), random_ids(2, 70)
    cache = Cache(model.config, 2, 70)
    found = torch.cat([model(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(found, model(ids), rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_every_row_of_a_ragged_batch_has_a_state_of_its_own():
    model = network()
    pool = PagePool(model.config, 8)
    lengths, caches, ids = (0, 1, 2, 3, 20, 41), [], random_ids(6, 60)
    for row, length in enumerate(lengths):
        caches.append(Cache(model.config, 1, 60, pool=pool))
        if length:
            model(ids[row : row + 1, :length], caches[-1])
    together = Cache.join(caches)
    new = torch.stack([ids[row, n : n + 19] for row, n in enumerate(lengths)])
    found = torch.cat([model(piece, together) for piece in new.split([1, 1, 12, 5], dim=1)], dim=1)
    for row, n in enumerate(lengths):
        expected = model(ids[row : row + 1, : n + 19])[0, n:]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("state_format", ["fp32", "bf16"])
@torch.no_grad()
def test_caches_fork_join_split_and_are_saved(state_format, tmp_path):
    model = network(options={"state_format": state_format})
    ids = random_ids(1, 41)
    cache = Cache(model.config, 1, 64)
    model(ids[:, :40], cache)
    expected = model(ids[:, 40:], cache.fork())
    assert torch.equal(model(ids[:, 40:], cache.fork()), expected)  # the first fork left the cache alone
    save_cache(cache, tmp_path / "cache.safetensors")
    restored = Cache(model.config, 1, 64)
    restore_cache(restored, tmp_path / "cache.safetensors")
    other = Cache(model.config, 1, 64, pool=cache.pool)
    cache.pool.grow(2)
    model(random_ids(1, 13, seed=2), other)
    together = Cache.join([cache, other])
    torch.testing.assert_close(model(ids[:, 40:].expand(2, 1), together.fork())[:1], expected, rtol=1e-4, atol=1e-4)
    for again in (restored, together.split()[0]):
        assert torch.equal(model(ids[:, 40:], again), expected)


@torch.no_grad()
def test_it_goes_back_only_to_the_ends_of_calls():
    model, ids = network(), random_ids(1, 40)
    cache = Cache(model.config, 1, 64, rewind=2)
    for piece in ids[:, :30].split([20, 8, 1, 1], dim=1):
        model(piece, cache)
    with pytest.raises(CacheError, match=r"cannot truncate from 30 to 27 tokens.*the recurrent states.*resume at 28"):
        cache.truncate(27)
    cache.truncate(28)
    torch.testing.assert_close(model(ids[:, 28:], cache), model(ids)[:, 28:], rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_generation_follows_the_full_pass():
    model, ids = network(), random_ids(1, 9)
    found = generate(model, ids, 20)
    for t in range(9, 29):
        assert found[0, t] == model(found[:, :t])[0, -1].argmax()


@pytest.mark.parametrize(("state_format", "width"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("rewind", [0, 3])
def test_its_bytes_are_those_of_its_storages_at_any_length(state_format, width, rewind):
    options = {"mamba2": {**OPTIONS, "state_format": state_format}}
    config = ModelConfig(**{**SMALL, "layers": ("mamba2",) * 3, "max_positions": 1 << 20, "mixer_options": options})
    state, tail = HEADS * 8 * 6, 3 * CONVOLVED
    expected = 3 * (rewind + 1) * (width * (state + tail) + 2 * 8)  # two positions of 8 bytes
    assert fixed_state_bytes(config, rewind) == {"state": expected} and cache_bytes_per_token(config) == {}
    for tokens in (1 << 10, 1 << 20):
        cache = Cache(config, 1, tokens, rewind=rewind)
        assert cache.nbytes() == cache.nbytes("state") == expected
        cache.begin(1, tokens)
        cache.advance()
        assert cache.nbytes() == expected


@torch.no_grad()
def test_decoding_allocates_no_cache():
    model = network(layers=("mamba2",))
    cache = Cache(model.config, 2, 200)
    before, storages = cache.nbytes(), [t.untyped_storage().data_ptr() for t in cache._fixed_tensors()]
    for token in random_ids(2, 200).split(1, dim=1):
        model(token, cache)
    assert cache.nbytes() == before
    assert [t.untyped_storage().data_ptr() for t in cache._fixed_tensors()] == storages


# --- precision


@torch.no_grad()
def test_a_bf16_state_is_close_and_halves_the_cache():
    wide, narrow = network(layers=("mamba2",)), network(layers=("mamba2",), options={"state_format": "bf16"})
    narrow.load_state_dict(wide.state_dict())
    ids, found = random_ids(2, 60), []
    for model in (wide, narrow):
        cache = Cache(model.config, 2, 60)
        found.append(torch.cat([model(piece, cache) for piece in ids.split([30, *[1] * 30], dim=1)], dim=1))
        states = [layer.parts[name].data.dtype for layer in cache.layers for name in ("state", "conv_tail")]
        assert set(states) == {torch.float32 if model is wide else torch.bfloat16}
    error = (found[0] - found[1]).abs().max()
    assert 0 < error < 0.1 * found[0].std()


def test_training_rounds_what_the_convolution_reads_as_the_cache_does():
    options = {"state_format": "bf16"}
    model = network(layers=("mamba2",), ffn="dense", options=options, qat=True)
    ids, aux = random_ids(1, 30), AuxOutputs()
    trained = model.train()(ids, aux=aux)
    assert aux.rounded["convolution"] == 1
    assert ("mamba2 inputs of the convolution", "bf16", "yes", 1) in format_table(model.config)
    with torch.no_grad():
        torch.testing.assert_close(trained, model.eval()(ids), rtol=1e-4, atol=1e-5)
        plain = network(layers=("mamba2",), ffn="dense", options=options, qat=False).train()(ids)
    assert (trained - plain).abs().max() > 1e-4


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


def test_widths_that_cannot_keep_their_bits_are_named():
    model = network(options={"head_dim": 2})
    with pytest.raises(ConfigError, match=r"multiples of 4, mixer_options\.mamba2\.head_dim is 2"):
        model.execution = Execution("batch-invariant")


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
    assert named["recurrent layers"].rule == f"{recurrent} mamba2 layers keep a state of fixed size"
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
        ({"head_dim": 0}, r"head_dim: expected a whole number of at least 1, found 0"),
        ({"state_size": 2.5}, r"state_size: expected a whole number of at least 1, found 2\.5"),
        ({"n_groups": 3}, r"n_groups: expected a divisor of 8 heads, found 3"),
        ({"conv_kernel": 1}, r"conv_kernel: expected a whole number of at least 2, found 1"),
        ({"conv_kernel": "4"}, r"conv_kernel: expected a whole number of at least 2, found '4'"),
        ({"chunk_size": True}, r"chunk_size: expected a whole number of at least 1, found True"),
        ({"state_format": "fp8"}, r"state_format: expected one of fp32, bf16, found 'fp8'"),
        ({"state_format": ["fp32"]}, r"state_format: expected one of fp32, bf16, found \['fp32'\]"),
        ({"use_conv_bias": 1}, r"use_conv_bias: expected true or false, found 1"),
        ({"expand": 0.7}, r"expand: expected a number above 0 that makes .* a whole number, found 0\.7"),
        ({"expand": -1}, r"expand: expected a number above 0"),
        ({"num_heads": 0}, r"num_heads: expected a whole number of at least 1, found 0"),
        ({"expand": 2, "num_heads": 5}, r"num_heads: expected 64 channels over head_dim 8 .*, found 5"),
        ({"time_step_min": 0}, r"time_step_min: expected a number above 0, found 0"),
        ({"time_step_max": 1e-5}, r"time_step_max: expected a number of at least 0\.001, found 1e-05"),
        ({"time_step_limit": [0.1]}, r"time_step_limit: expected two rising numbers.*found \[0\.1\]"),
        ({"time_step_limit": [0.1, 0.1]}, r"time_step_limit: expected two rising numbers"),
        ({"time_step_limit": [0.0, math.inf]}, r"time_step_limit: expected .* null for no limit, found \[0\.0, inf\]"),
        ({"states": 1}, r"states: unknown option; there are expand, num_heads"),
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


def test_parts_are_declared_once_per_layer():
    parts = Mamba2.cache_parts(ModelConfig(**{**SMALL, "layers": ("mamba2",)}))
    assert parts == {
        "state": RecurrentPart((HEADS, 8, 6), torch.float32),
        "conv_tail": RecurrentPart((3, CONVOLVED), torch.float32),
    }
