"""Execution modes of the forward pass, compared with each other."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernels.index_topk.eager as streamed
import model.mixers.indexer as indexer
from kernels import native
from model.cache import Cache
from model.cache.pages import PagePool
from model.cache.random_fill import fill_random
from model.config import ModelConfig
from model.errors import ConfigError
from model.forward.execution import TOKEN_TILE, Execution
from model.transformer import Transformer
from tests.model.networks import BF16, EXACT, SMALL, build

NETWORKS = {
    "hybrid": {},
    "fp32": EXACT,
    "bf16": BF16,
    "fp4 entries": {"kv_format": "fp4", "index_format": "fp8", "gqa_format": "fp8", "layers": ("csa", "hca", "gqa")},
    "csa": {"layers": ("csa", "csa")},
    "odd ratios": {"layers": ("csa", "hca"), "csa_ratio": 3, "hca_ratio": 6, "window": 20},
    "window 1": {"layers": ("csa", "hca"), "window": 1},
    "gqa": {"layers": ("gqa", "sliding"), "num_kv_heads": 2},
    "recurrent": {"layers": ("mamba2", "csa", "mamba2")},
    "delta rule": {"layers": ("kda", "csa", "kda")},
    "mla": {"layers": ("mla", "mla")},
    "dsa": {"layers": ("dsa", "dsa"), "kv_format": "fp8_128", "index_format": "fp8_128"},
    "latents and entries": {"layers": ("dsa", "csa", "mla", "hca")},
    "hash-routed": {"num_hash_layers": 4},
    "scored": {"num_hash_layers": 0, "num_shared_experts": 0, "experts_per_token": 3},
    "dense": {"ffn": "dense", "ffn_size": 24},
    "plain residual": {"hyper_connections": False},
    "one index head": {"index_heads": 1},
    "narrow": {
        **{"hidden_size": 36, "head_dim": 20, "rope_head_dim": 4, "q_lora_rank": 12, "o_lora_rank": 4},
        **{"expert_size": 12, "vocab_size": 51, "index_heads": 3, "kv_format": "fp32", "rope_format": "fp32"},
    },
}
MODELS = {name: build(**change) for name, change in NETWORKS.items()}
MAX_TOKENS = 120
PIECE = st.one_of(st.sampled_from([1, TOKEN_TILE - 1, TOKEN_TILE, TOKEN_TILE + 1, 2 * TOKEN_TILE]), st.integers(1, 50))


def read(model, cache, ids, pieces):
    """Return logits of ids [B, S], read in chunks whose sizes repeat ``pieces``."""
    outputs, done = [], 0
    with torch.inference_mode():
        while done < ids.shape[1]:
            piece = ids[:, done : done + pieces[len(outputs) % len(pieces)]]
            outputs.append(model(piece, cache))
            done += piece.shape[1]
    return torch.cat(outputs, dim=1)


def random_ids(model, *shape):
    return torch.randint(0, model.config.vocab_size, shape)


def alone(model, ids, pieces=(MAX_TOKENS,), most=MAX_TOKENS):
    return read(model, Cache(model.config, len(ids), most), ids, pieces)


def in_company(model, ids, start, others, place, pieces):
    """Return logits of ids [1, S] from token ``start``, in a batch with random sequences of lengths ``others``."""
    lengths = [*others[:place], start, *others[place:]]
    pool = PagePool(model.config, len(lengths) * -(-2 * MAX_TOKENS // model.config.page_tokens))
    caches = [Cache(model.config, 1, 2 * MAX_TOKENS, pool=pool) for _ in lengths]
    batch = random_ids(model, len(lengths), ids.shape[1] - start)
    batch[place] = ids[0, start:]
    for i, (cache, length) in enumerate(zip(caches, lengths)):
        if length:
            read(model, cache, ids[:, :start] if i == place else random_ids(model, 1, length), [length])
    return read(model, Cache.join(caches), batch, pieces)[place : place + 1]


@pytest.fixture()
def mode():
    """Set a network's execution mode for one test."""
    changed = []

    def choose(model, name):
        changed.append(model)
        model.execution = Execution(name)
        return model

    yield choose
    for model in changed:
        model.execution = Execution()


def same_bits(name, seed, tokens, pieces, others, place, start):
    model = MODELS[name]
    model.execution = Execution("batch-invariant")
    try:
        torch.manual_seed(seed)
        ids = random_ids(model, 1, tokens)
        expected = alone(model, ids)
        assert torch.equal(alone(model, ids, pieces), expected)
        start = min(start, tokens - 1)
        found = in_company(model, ids, start, others, min(place, len(others)), pieces)
        assert torch.equal(found, expected[:, start:])
    finally:
        model.execution = Execution()


SITUATIONS = {
    "name": st.sampled_from(sorted(NETWORKS)),
    "seed": st.integers(0, 999),
    "tokens": st.integers(1, MAX_TOKENS),
    "pieces": st.lists(PIECE, min_size=1, max_size=6),
    "others": st.lists(st.integers(0, MAX_TOKENS), max_size=5),
    "place": st.integers(0, 5),
    "start": st.integers(0, MAX_TOKENS),
}
THOROUGH = {"suppress_health_check": list(HealthCheck)}


@settings(max_examples=20, **THOROUGH)
@given(**SITUATIONS)
def test_bits_do_not_depend_on_other_sequences_or_pieces(**situation):
    same_bits(**situation)


@pytest.mark.long
@pytest.mark.timeout(1800)
@settings(max_examples=600, **THOROUGH)
@given(**SITUATIONS)
def test_bits_do_not_depend_on_other_sequences_or_pieces_in_many_situations(**situation):
    same_bits(**situation)


@pytest.mark.parametrize("name", NETWORKS)
def test_single_tokens_have_the_bits_of_one_piece(name, mode):
    """The tests above fail in auto mode, so they depend on the mode."""
    model = MODELS[name]
    ids = random_ids(model, 2, 60)
    assert torch.equal(alone(mode(model, "batch-invariant"), ids, [1]), alone(model, ids))
    mode(model, "auto")
    assert not torch.equal(alone(model, ids, [1]), alone(model, ids))


@pytest.mark.parametrize("sequences", [TOKEN_TILE - 1, TOKEN_TILE, 2 * TOKEN_TILE])
@pytest.mark.parametrize("name", NETWORKS)
def test_many_sequences_of_equal_lengths(name, sequences, mode):
    """They share their positions, and whole tiles need no padding."""
    model = mode(MODELS[name], "batch-invariant")
    ids = random_ids(model, sequences, 3)
    found = alone(model, ids, pieces=(1,))
    for place in (0, sequences - 1):
        assert torch.equal(found[place : place + 1], alone(model, ids[place : place + 1], pieces=(1,)))


@pytest.mark.parametrize("name", ["csa", "odd ratios"])
def test_every_phase_of_a_block_in_one_batch(name, mode):
    model = mode(MODELS[name], "batch-invariant")
    ids, phases = random_ids(model, 14, 40), range(14)
    expected = [alone(model, ids[i : i + 1]) for i in phases]
    pool = PagePool(model.config, 2 * len(phases))
    caches = [Cache(model.config, 1, 60, pool=pool) for _ in phases]
    for i in phases:
        if i:
            read(model, caches[i], ids[i : i + 1, :i], [i])
    batch = torch.stack([ids[i, i : i + 26] for i in phases])
    for i, found in zip(phases, read(model, Cache.join(caches), batch, [5, 1, 9])):
        assert torch.equal(found, expected[i][0, i : i + 26]), i


def test_scores_keep_their_bits_as_well(mode, monkeypatch):
    """Compare the scores, because selections hide most of their differences."""
    rows, original = [], streamed.topk_indices

    def watch(scores, k):
        rows.extend(scores)
        return original(scores, k)

    monkeypatch.setattr(native, "level", lambda: None)
    monkeypatch.setattr(streamed, "topk_indices", watch)
    model = mode(build(layers=("csa",), index_format="fp32", index_head_dim=128), "batch-invariant")
    ids, found = random_ids(model, 1, 60), []
    for pieces in ([60], [1], [7, 16]):
        alone(model, ids, pieces)
        found.append(list(rows))
        rows.clear()
    for whole, *others in zip(*found, strict=True):
        assert all(torch.equal(other, whole) for other in others)


def test_bits_are_kept_over_a_long_history(mode):
    """Cover several tiles of index keys and of entries visible to all queries."""
    model = mode(build(layers=("csa", "hca", "gqa", "mla", "dsa"), max_positions=1 << 14), "batch-invariant")
    ids, histories = random_ids(model, 4, 20), (60, 9000, 6500, 13_000)
    pool = PagePool(model.config, sum(-(-(n + 20) // model.config.page_tokens) for n in histories))
    caches, expected = [], []
    for i, history in enumerate(histories):
        for room in ({}, {"pool": pool}):
            cache = Cache(model.config, 1, 1 << 14, **room)
            fill_random(cache, history, seed=i)
            caches += [cache] if room else []
            expected += [] if room else [read(model, cache, ids[i : i + 1], [20])]
    assert torch.equal(read(model, Cache.join(caches), ids, [1, 3, 16]), torch.cat(expected))


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_are_kept_with_more_threads(threads, mode):
    """Use widths at which a tile is processed by several threads."""
    wide = {"hidden_size": 640, "head_dim": 64, "num_heads": 8, "expert_size": 132, "init_std": 0.05}
    model = mode(build(layers=("csa", "hca"), **wide), "batch-invariant")
    ids = random_ids(model, 1, 18)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = alone(model, ids)
        assert torch.equal(alone(model, ids, [1, 16, 1]), expected)
        assert torch.equal(in_company(model, ids, 5, [0, 9], 1, [12, 1]), expected[:, 5:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("preset", "history"), [("tiny", 0), ("tiny", 6000), ("small", 0), ("small", 9000)])
def test_bits_are_kept_at_real_widths(preset, history, threads, mode):
    torch.manual_seed(0)
    model = mode(Transformer(ModelConfig.from_preset(preset)).eval(), "batch-invariant")
    ids, lengths = random_ids(model, 3, 40), (history // 3, history, 2 * history)
    pages = sum(-(-(n + 40) // model.config.page_tokens) for n in lengths)
    pool, caches, expected = PagePool(model.config, pages), [], []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for i, length in enumerate(lengths):
            own, joined = (Cache(model.config, 1, length + 40, **room) for room in ({}, {"pool": pool}))
            for cache in (own, joined):
                if length:
                    fill_random(cache, length, seed=i)
            caches.append(joined)
            expected.append(read(model, own, ids[i : i + 1], [40]))
        assert torch.equal(read(model, Cache.join(caches), ids, [1, 17, 5]), torch.cat(expected))
    finally:
        torch.set_num_threads(before)


# --- comparing modes


class Choices:
    """Record all selections in order: int64 [B, S, k]."""

    def __init__(self, monkeypatch):
        self.numbers = []
        original = indexer.index_topk

        def watch(*arguments):
            self.numbers.append(original(*arguments))
            return self.numbers[-1]

        monkeypatch.setattr(indexer, "index_topk", watch)

    def take(self):
        numbers, self.numbers = self.numbers, []
        return torch.cat([x.flatten() for x in numbers]) if numbers else torch.empty(0)


def assert_close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("natively", [True, False])
def test_auto_mode_is_close_and_selects_the_same_entries(name, natively, mode, monkeypatch):
    if not natively:
        monkeypatch.setattr(native, "level", lambda: None)
    choices = Choices(monkeypatch)
    model = build(**{**NETWORKS[name], **EXACT})
    for pieces in ([70], [23, 1, 1, 16, 1]):
        ids = random_ids(model, 1, 70)
        expected = alone(mode(model, "batch-invariant"), ids, pieces)
        chosen = choices.take()
        found = alone(mode(model, "auto"), ids, pieces)
        assert_close(found, expected)
        assert torch.equal(choices.take(), chosen)


@pytest.mark.parametrize("name", ["hybrid", "fp4 entries", "one index head", "dsa"])
def test_released_formats_select_the_same_entries(name, mode, monkeypatch):
    """With quantized entries logits may differ by one code, but selections are equal."""
    choices, model = Choices(monkeypatch), MODELS[name]
    ids = random_ids(model, 1, MAX_TOKENS)
    alone(mode(model, "batch-invariant"), ids, [40, 1])
    chosen = choices.take()
    alone(mode(model, "auto"), ids, [40, 1])
    assert torch.equal(choices.take(), chosen)


def test_unknown_modes_are_named():
    with pytest.raises(ConfigError, match="execution: 'fast' is not one of auto, batch-invariant"):
        Execution("fast")
    assert Execution().mode == "auto"
    with pytest.raises(ValueError, match=r"execution: expected an Execution, .* found 'auto'"):
        build().execution = "auto"


@pytest.mark.parametrize(("width", "size"), [("hidden_size", 37), ("head_dim", 18), ("expert_size", 13)])
def test_widths_that_cannot_keep_their_bits_are_named(width, size):
    model = build(**{width: size})
    with pytest.raises(ConfigError, match=f"widths that are multiples of 4, {width} is {size}"):
        model.execution = Execution("batch-invariant")
    assert model.execution.mode == "auto"


def test_passes_without_a_cache_have_the_bits_of_cached_ones(mode):
    model = mode(MODELS["hybrid"], "batch-invariant")
    ids = random_ids(model, 2, 50)
    with torch.inference_mode():
        assert torch.equal(model(ids), alone(model, ids, [7]))
        for refused in ({"attention": "dense"}, {"positions": torch.arange(50).expand(2, 50)}):
            with pytest.raises(ValueError, match="batch-invariant mode has no packed documents"):
                model(ids, **refused)
        for unread in (ids[0], ids[:, :0]):
            with pytest.raises(ValueError, match=r"input_ids: expected integers \[B, S\]"):
                model(unread)


def test_gradients_recorded_outside_training(mode):
    model = build().eval()
    ids = random_ids(model, 1, 30)
    mode(model, "auto")(ids).square().mean().backward()
    assert model.embed.weight.grad.abs().sum() > 0
    recorded = mode(model, "batch-invariant")(ids).detach()  # computed from a cache, which has no gradient
    assert_close(recorded, alone(model, ids))


def test_training_is_the_same_in_every_mode(mode):
    model = build().train()
    ids = torch.randint(0, SMALL["vocab_size"], (2, 30))
    expected = model(ids)
    assert torch.equal(mode(model, "batch-invariant")(ids), expected)
