"""The kda mixer in a network: training, caches of fixed size, batch-invariant mode, costs and options."""

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
from model.costs import cache_bytes, cache_bytes_per_token, count_parameters, decode_work, fixed_state_bytes, waterfall
from model.distributed.fsdp import sharded_names
from model.errors import CacheError, ConfigError
from model.forward.aux_outputs import AuxOutputs
from model.forward.context import Context
from model.forward.execution import TOKEN_TILE, Execution
from model.generation import generate
from model.mixers.kda import KimiDeltaAttention
from model.optim import MuonAdamW, OptimizerConfig
from model.precision import format_table
from tests.model.networks import EXACT, SMALL, build

OPTIONS = SMALL["mixer_options"]["kda"]
LAYERS = ("kda", "csa", "kda", "hca")
HEADS, HEAD_DIM, INNER = 4, 8, 32
"""Sizes of a layer at :data:`OPTIONS` and a hidden size of 32."""
MATRICES = {"in_proj.weight", "decay_proj.weight", "gate_proj.weight", "out_proj.weight"}


def network(layers=LAYERS, options=None, **overrides):
    given = {**SMALL["mixer_options"], "kda": {**OPTIONS, **(options or {})}}
    return build(layers=layers, mixer_options=given, **{**EXACT, **overrides})


def random_ids(*shape, seed=1):
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


# --- training


def test_every_parameter_trains_under_the_rule_of_its_role():
    model = network(mtp_layers=1).train()
    optimizer = MuonAdamW(model.named_parameters(), OptimizerConfig(learning_rate=3e-3), model.split_sizes())
    rules = {name: group["rule"] for group in optimizer.param_groups for name in group["names"]}
    own = {name.removeprefix("layers.0.attn."): rule for name, rule in rules.items() if "layers.0.attn." in name}
    assert {name for name, rule in own.items() if rule == "muon"} == MATRICES
    assert own.keys() - MATRICES == {"conv.weight", "A_log", "dt_bias", "norm.weight"}
    assert model.split_sizes()["layers.0.attn.in_proj.weight"] == (INNER, INNER, INNER, HEAD_DIM, HEAD_DIM, HEADS)
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


def test_filters_rates_and_step_biases_do_not_decay():
    model = network()
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = MuonAdamW(model.named_parameters(), config, model.split_sizes())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.removeprefix("layers.0.attn.") for name in moved if name.startswith("layers.0.attn.")} == MATRICES


def test_convolutions_stay_whole_where_matrices_are_sharded():
    names = {name.removeprefix("layers.0.attn.") for name in sharded_names(network()) if "layers.0.attn." in name}
    assert names == MATRICES


def test_autocast_keeps_the_recurrence_in_float32():
    model = network(layers=("kda",), ffn="dense").train()
    ids = random_ids(2, 90)
    expected = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids)
    assert (found - expected).abs().max() < 0.15 * expected.std()
    found.square().mean().backward()
    for name, p in model.layers[0].attn.named_parameters():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name


def test_initial_decays_are_the_authors():
    layer = network(layers=("kda",) * 3).layers[1].attn
    steps, rates = F.softplus(layer.dt_bias.detach()), layer.A_log.detach().exp()
    assert (steps > 0.00099).all() and (steps < 0.101).all() and steps.std() > 0
    assert (rates >= 1).all() and (rates <= 16).all() and rates.std() > 0


def test_the_length_of_a_chunk_changes_nothing():
    ids, found = random_ids(2, 45), []
    for chunk in (1, 4, 32, 128):
        model = network(layers=("kda",), options={"chunk_size": chunk}).train()
        model(ids).square().mean().backward()
        found.append([p.grad for p in model.layers[0].attn.parameters()])
    for gradients in found[1:]:
        for ours, expected in zip(gradients, found[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def train(model, optimizer, steps):
    for step in steps:
        ids = random_ids(2, 40, seed=step)
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_resumes_bit_by_bit(tmp_path):
    def optimizer_of(model):
        return MuonAdamW(model.named_parameters(), OptimizerConfig(), model.split_sizes())

    model = network().train()
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
def test_its_bytes_are_those_of_its_storages_from_a_thousand_to_a_million_tokens(state_format, width, rewind):
    options = {"kda": {**OPTIONS, "state_format": state_format}}
    config = ModelConfig(**{**SMALL, "layers": ("kda",) * 3, "max_positions": 1 << 20, "mixer_options": options})
    numbers = HEADS * HEAD_DIM * HEAD_DIM + 3 * 3 * INNER  # the state, and three tokens of queries, keys and values
    expected = 3 * (rewind + 1) * (width * numbers + 2 * 8)  # two positions of 8 bytes
    assert fixed_state_bytes(config, rewind) == {"state": expected} and cache_bytes_per_token(config) == {}
    for tokens in (1 << 10, 1 << 20):
        cache = Cache(config, 1, tokens, rewind=rewind)
        assert cache.nbytes() == cache.nbytes("state") == expected
        cache.begin(1, tokens)
        cache.advance()
        assert cache.nbytes() == expected
        assert rewind or cache_bytes(config, tokens) == expected


@torch.no_grad()
def test_decoding_allocates_no_cache():
    model = network(layers=("kda",))
    cache = Cache(model.config, 2, 200)
    before, storages = cache.nbytes(), [t.untyped_storage().data_ptr() for t in cache._fixed_tensors()]
    for token in random_ids(2, 200).split(1, dim=1):
        model(token, cache)
    assert cache.nbytes() == before
    assert [t.untyped_storage().data_ptr() for t in cache._fixed_tensors()] == storages


# --- precision


@torch.no_grad()
def test_a_bf16_state_is_close_and_halves_the_cache():
    wide, narrow = network(layers=("kda",)), network(layers=("kda",), options={"state_format": "bf16"})
    narrow.load_state_dict(wide.state_dict())
    ids, found = random_ids(2, 60), []
    for model in (wide, narrow):
        cache = Cache(model.config, 2, 60)
        found.append(torch.cat([model(piece, cache) for piece in ids.split([30, *[1] * 30], dim=1)], dim=1))
        states = {layer.parts[name].data.dtype for layer in cache.layers for name in ("state", "conv_tail")}
        assert states == {torch.float32 if model is wide else torch.bfloat16}
    error = (found[0] - found[1]).abs().max()
    assert 0 < error < 0.15 * found[0].std()


def test_training_rounds_what_the_convolution_reads_as_the_cache_does():
    options = {"state_format": "bf16"}
    model = network(layers=("kda",), ffn="dense", options=options, qat=True)
    ids, aux = random_ids(1, 30), AuxOutputs()
    trained = model.train()(ids, aux=aux)
    assert aux.rounded["convolution"] == 1
    assert ("kda inputs of the convolution", "bf16", "yes", 1) in format_table(model.config)
    with torch.no_grad():
        torch.testing.assert_close(trained, model.eval()(ids), rtol=1e-4, atol=1e-4)
        plain = network(layers=("kda",), ffn="dense", options=options, qat=False).train()(ids)
    assert (trained - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options", [{}, {"state_format": "bf16"}, {"num_heads": 3, "head_dim": 4}, {"num_heads": 1, "head_dim": 4}]
)
@torch.no_grad()
def test_batch_invariant_bits_do_not_depend_on_pieces_or_company(options):
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
def test_a_token_projects_to_the_same_bits_at_every_place_of_a_tile(heads):
    layer = network(options={"num_heads": heads, "head_dim": 4}).layers[0].attn
    context = Context(torch.zeros(1, 1, dtype=torch.int64), {}, execution=Execution("batch-invariant"))
    for _ in range(10):
        x, order = torch.randn(1, TOKEN_TILE, 32), torch.randperm(TOKEN_TILE)
        found, expected = (layer.project(tile, None, context, cached=True) for tile in (x[:, order], x))
        assert all(torch.equal(a, b[:, order]) for a, b in zip(found, expected, strict=True))


def test_widths_that_cannot_keep_their_bits_are_named():
    model = network(options={"head_dim": 2})
    with pytest.raises(ConfigError, match=r"multiples of 4, mixer_options\.kda\.head_dim is 2"):
        model.execution = Execution("batch-invariant")


@torch.no_grad()
def test_bf16_weights_give_nearly_the_same():
    model, ids = network(), random_ids(2, 50)
    expected = model(ids)
    model.cast_weights(torch.bfloat16)
    layer = model.layers[0].attn
    assert {name for name, p in layer.named_parameters() if p.dtype == torch.bfloat16} == MATRICES
    cache = Cache(model.config, 2, 50)
    found = torch.cat([model(piece, cache) for piece in ids.split([30, *[1] * 20], dim=1)], dim=1)
    assert (found - expected).abs().mean() < 0.1 * expected.std()


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
        ({"head_dim": 0}, r"head_dim: expected a whole number of at least 1, found 0"),
        ({"head_dim": None}, r"head_dim: expected a whole number of at least 1, found None"),
        ({"num_heads": 0}, r"num_heads: expected a whole number of at least 1, found 0"),
        ({"num_heads": 2.0}, r"num_heads: expected a whole number of at least 1, found 2\.0"),
        ({"conv_kernel": 1}, r"conv_kernel: expected a whole number of at least 2, found 1"),
        ({"conv_kernel": "4"}, r"conv_kernel: expected a whole number of at least 2, found '4'"),
        ({"chunk_size": 24}, r"chunk_size: expected a power of two, found 24"),
        ({"chunk_size": True}, r"chunk_size: expected a power of two, found True"),
        ({"chunk_size": 0}, r"chunk_size: expected a power of two, found 0"),
        ({"state_format": "fp8"}, r"state_format: expected one of fp32, bf16, found 'fp8'"),
        ({"state_format": ["fp32"]}, r"state_format: expected one of fp32, bf16, found \['fp32'\]"),
        ({"heads": 1}, r"heads: unknown option; there are num_heads, head_dim, conv_kernel"),
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


def test_a_checkpoint_keeps_the_options(tmp_path):
    model = network(options={"state_format": "bf16", "num_heads": 3, "head_dim": 12, "conv_kernel": 3})
    checkpoint.save(model, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded.eval()(random_ids(1, 20)), model(random_ids(1, 20)))


def test_parts_are_declared_once_per_layer():
    parts = KimiDeltaAttention.cache_parts(ModelConfig(**{**SMALL, "layers": ("kda",)}))
    assert parts == {
        "state": RecurrentPart((HEADS, HEAD_DIM, HEAD_DIM), torch.float32),
        "conv_tail": RecurrentPart((3, 3 * INNER), torch.float32),
    }
