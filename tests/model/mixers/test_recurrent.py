"""Recurrent mixers in a network: training, caches of fixed size, precision, costs and options that they share."""

import copy

import pytest
import torch
import torch.nn.functional as F

from model import checkpoint
from model.cache import Cache
from model.cache.file import restore_cache, save_cache
from model.cache.pages import PagePool
from model.cache.parts import RecurrentPart
from model.config import ModelConfig
from model.costs import cache_bytes, cache_bytes_per_token, fixed_state_bytes
from model.distributed.fsdp import sharded_names
from model.errors import CacheError, ConfigError
from model.forward.aux_outputs import AuxOutputs
from model.forward.execution import Execution
from model.generation import generate
from model.mixers import MIXERS
from model.optim import MuonAdamW, OptimizerConfig
from model.precision import format_table
from tests.model.networks import EXACT, SMALL, build, random_ids

MATRICES = {
    "mamba2": {"in_proj.weight", "out_proj.weight"},
    "kda": {"in_proj.weight", "decay_proj.weight", "gate_proj.weight", "out_proj.weight"},
}
"""Parameters under Muon, by mixer."""
OTHERS = {
    "mamba2": {"conv.weight", "conv.bias", "A_log", "D", "dt_bias", "norm.weight"},
    "kda": {"conv.weight", "A_log", "dt_bias", "norm.weight"},
}
PARTS = {"mamba2": (64, 64, 12, 12, 8), "kda": (32, 32, 32, 8, 8, 4)}
"""Rows of the parts of the input projection."""
STATES = {"mamba2": (8, 8, 6), "kda": (4, 8, 8)}
TAILS = {"mamba2": (3, 64 + 2 * 2 * 6), "kda": (3, 3 * 32)}
pytestmark = pytest.mark.parametrize("mixer", MATRICES)


def options_of(mixer, **options):
    return {**SMALL["mixer_options"], mixer: {**SMALL["mixer_options"][mixer], **options}}


def network(mixer, layers=None, options=None, **overrides):
    """Return a network of layers that alternate with compressed attention, or of ``layers``."""
    layers = layers or (mixer, "csa", mixer, "hca")
    return build(layers=layers, mixer_options=options_of(mixer, **(options or {})), **{**EXACT, **overrides})


def first_layer(names):
    """Return those names that belong to the mixer of the first layer, without their prefix."""
    prefix = "layers.0.attn."
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


# --- training


def train(model, optimizer, steps):
    for step in steps:
        ids = random_ids(2, 40, seed=step)
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model, **settings):
    return MuonAdamW(model.named_parameters(), OptimizerConfig(**settings), model.split_sizes())


def test_every_parameter_trains_under_the_rule_of_its_role(mixer):
    model = network(mixer, mtp_layers=1).train()
    optimizer = optimizer_of(model, learning_rate=3e-3)
    rules = {rule: set() for rule in ("muon", "adamw")}
    for group in optimizer.param_groups:
        rules[group["rule"]] |= first_layer(group["names"])
    assert rules == {"muon": MATRICES[mixer], "adamw": OTHERS[mixer]}
    assert model.split_sizes()["layers.0.attn.in_proj.weight"] == PARTS[mixer]
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


def test_only_matrices_decay(mixer):
    model = network(mixer)
    optimizer = optimizer_of(model, learning_rate=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert first_layer(moved) == MATRICES[mixer] and "embed.weight" in moved


def test_only_matrices_are_sharded(mixer):
    assert first_layer(sharded_names(network(mixer))) == MATRICES[mixer]


def test_autocast_keeps_the_recurrence_in_float32(mixer):
    model = network(mixer, layers=(mixer,), ffn="dense").train()
    ids = random_ids(2, 90)
    expected = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids)
    assert (found - expected).abs().max() < 0.15 * expected.std()
    found.square().mean().backward()
    for name, p in model.layers[0].attn.named_parameters():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name


def test_training_resumes_bit_by_bit(mixer, tmp_path):
    model = network(mixer).train()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    checkpoint.save(model, tmp_path / "model")
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2, 4))
    resumed = checkpoint.load(tmp_path / "model").train()
    again = optimizer_of(resumed)
    again.load_state_dict(state)
    train(resumed, again, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


# --- caches


@pytest.mark.parametrize("pieces", [[70], [1] * 70, [17, 1, 9, 30, 13], [33, 37]])
@torch.no_grad()
def test_cached_pieces_equal_the_full_pass(mixer, pieces):
    model, ids = network(mixer), random_ids(2, 70)
    cache = Cache(model.config, 2, 70)
    found = torch.cat([model(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(found, model(ids), rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_sequences_of_different_lengths_are_decoded_together(mixer):
    model = network(mixer)
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
def test_caches_fork_join_split_and_are_saved(mixer, state_format, tmp_path):
    model = network(mixer, options={"state_format": state_format})
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
def test_a_cache_can_be_truncated_to_the_end_of_a_call_only(mixer):
    model, ids = network(mixer), random_ids(1, 40)
    cache = Cache(model.config, 1, 64, rewind=2)
    for piece in ids[:, :30].split([20, 8, 1, 1], dim=1):
        model(piece, cache)
    with pytest.raises(CacheError, match=r"cannot truncate from 30 to 27 tokens.*the recurrent states.*resume at 28"):
        cache.truncate(27)
    cache.truncate(28)
    torch.testing.assert_close(model(ids[:, 28:], cache), model(ids)[:, 28:], rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_generation_follows_the_full_pass(mixer):
    model, ids = network(mixer), random_ids(1, 9)
    found = generate(model, ids, 20)
    for t in range(9, 29):
        assert found[0, t] == model(found[:, :t])[0, -1].argmax()


@pytest.mark.parametrize(("state_format", "width"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("rewind", [0, 3])
def test_cache_bytes_do_not_depend_on_the_length(mixer, state_format, width, rewind):
    fields = {"layers": (mixer,) * 3, "max_positions": 1 << 20}
    config = ModelConfig(**{**SMALL, **fields, "mixer_options": options_of(mixer, state_format=state_format)})
    values = torch.Size(STATES[mixer]).numel() + torch.Size(TAILS[mixer]).numel()
    expected = 3 * (rewind + 1) * (width * values + 2 * 8)  # two positions of 8 bytes
    assert fixed_state_bytes(config, rewind) == {"state": expected} and cache_bytes_per_token(config) == {}
    for tokens in (1 << 10, 1 << 20):
        cache = Cache(config, 1, tokens, rewind=rewind)
        assert cache.nbytes() == cache.nbytes("state") == expected
        cache.begin(1, tokens)
        cache.advance()
        assert cache.nbytes() == expected
        assert rewind or cache_bytes(config, tokens) == expected


@torch.no_grad()
def test_decoding_allocates_no_cache(mixer):
    model = network(mixer, layers=(mixer,))
    cache = Cache(model.config, 2, 200)
    before, storages = cache.nbytes(), [t.untyped_storage().data_ptr() for t in cache._fixed_tensors()]
    for token in random_ids(2, 200).split(1, dim=1):
        model(token, cache)
    assert cache.nbytes() == before
    assert [t.untyped_storage().data_ptr() for t in cache._fixed_tensors()] == storages


# --- precision


@torch.no_grad()
def test_a_bf16_state_is_close_to_float32(mixer):
    wide = network(mixer, layers=(mixer,))
    narrow = network(mixer, layers=(mixer,), options={"state_format": "bf16"})
    narrow.load_state_dict(wide.state_dict())
    ids, found = random_ids(2, 60), []
    for model in (wide, narrow):
        cache = Cache(model.config, 2, 60)
        found.append(torch.cat([model(piece, cache) for piece in ids.split([30, *[1] * 30], dim=1)], dim=1))
        states = {layer.parts[name].data.dtype for layer in cache.layers for name in ("state", "conv_tail")}
        assert states == {torch.float32 if model is wide else torch.bfloat16}
    error = (found[0] - found[1]).abs().max()
    assert 0 < error < 0.15 * found[0].std()


def test_training_rounds_the_inputs_of_the_convolution_as_the_cache_does(mixer):
    settings = {"layers": (mixer,), "ffn": "dense", "options": {"state_format": "bf16"}}
    model = network(mixer, qat=True, **settings)
    ids, aux = random_ids(1, 30), AuxOutputs()
    trained = model.train()(ids, aux=aux)
    assert aux.rounded["convolution"] == 1
    assert (f"{mixer} inputs of the convolution", "bf16", "yes", 1) in format_table(model.config)
    with torch.no_grad():
        torch.testing.assert_close(trained, model.eval()(ids), rtol=1e-4, atol=1e-4)
        plain = network(mixer, qat=False, **settings).train()(ids)
    assert (trained - plain).abs().max() > 5e-4


@torch.no_grad()
def test_bf16_weights_are_close_to_float32(mixer):
    model, ids = network(mixer), random_ids(2, 50)
    expected = model(ids)
    model.cast_weights(torch.bfloat16)
    layer = model.layers[0].attn
    assert {name for name, p in layer.named_parameters() if p.dtype == torch.bfloat16} == MATRICES[mixer]
    cache = Cache(model.config, 2, 50)
    found = torch.cat([model(piece, cache) for piece in ids.split([30, *[1] * 20], dim=1)], dim=1)
    assert (found - expected).abs().mean() < 0.1 * expected.std()


def test_widths_without_a_batch_invariant_mode_are_named(mixer):
    model = network(mixer, options={"head_dim": 2})
    with pytest.raises(ConfigError, match=rf"multiples of 4, mixer_options\.{mixer}\.head_dim is 2"):
        model.execution = Execution("batch-invariant")


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 0}, r"head_dim: expected a whole number of at least 1, found 0"),
        ({"head_dim": None}, r"head_dim: expected a whole number of at least 1, found null"),
        ({"num_heads": 0}, r"num_heads: expected a whole number of at least 1 or null, found 0"),
        ({"num_heads": 2.0}, r"num_heads: expected a whole number of at least 1 or null, found 2\.0"),
        ({"conv_kernel": 1}, r"conv_kernel: expected a whole number of at least 2, found 1"),
        ({"conv_kernel": "4"}, r"conv_kernel: expected a whole number of at least 2, found '4'"),
        ({"state_format": "fp8"}, r"state_format: expected one of fp32, bf16, found 'fp8'"),
        ({"state_format": ["fp32"]}, r"state_format: expected one of fp32, bf16, found \['fp32'\]"),
        ({"states": 1}, r"states: unknown option; there are .*num_heads"),
    ],
)
def test_bad_options_are_named(mixer, options, message):
    with pytest.raises(ConfigError, match=rf"^mixer_options\.{mixer}\.{message}"):
        ModelConfig(**{**SMALL, "layers": (mixer,), "mixer_options": options_of(mixer, **options)})


def test_a_checkpoint_keeps_the_options(mixer, tmp_path):
    model = network(mixer, options={"state_format": "bf16", "num_heads": 4, "head_dim": 12, "conv_kernel": 3})
    checkpoint.save(model, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded.eval()(random_ids(1, 20)), model(random_ids(1, 20)))


def test_parts_of_the_cache_have_the_declared_shapes(mixer):
    parts = MIXERS[mixer].cache_parts(ModelConfig(**{**SMALL, "layers": (mixer,)}))
    assert parts == {
        "state": RecurrentPart(STATES[mixer], torch.float32),
        "conv_tail": RecurrentPart(TAILS[mixer], torch.float32),
    }
