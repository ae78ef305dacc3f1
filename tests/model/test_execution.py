"""The ways to compute a forward pass: what each promises, against the others."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import BF16, EXACT, SMALL, build
from torch.utils._pytree import tree_flatten

import kernels.index_topk.streamed as streamed
import model.mixers.csa as csa
from model import execution
from model.cache import Cache
from model.cache_filling import fill_random
from model.config import ModelConfig
from model.errors import ConfigError
from model.execution import TILE, Execution
from model.paging import PagePool
from model.telemetry import Telemetry
from model.transformer import Transformer

NETWORKS = {
    "hybrid": {},
    "fp32": EXACT,
    "bf16": BF16,
    "fp4 entries": {"kv_format": "fp4", "index_format": "fp8", "gqa_format": "fp8", "layers": ("csa", "hca", "gqa")},
    "csa": {"layers": ("csa", "csa")},
    "odd ratios": {"layers": ("csa", "hca"), "csa_ratio": 3, "hca_ratio": 6, "window": 20},
    "window 1": {"layers": ("csa", "hca"), "window": 1},
    "gqa": {"layers": ("gqa", "sliding"), "num_kv_heads": 2},
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
MOST = 120
PIECE = st.one_of(st.sampled_from([1, TILE - 1, TILE, TILE + 1, 2 * TILE]), st.integers(1, 50))


def read(model, cache, ids, pieces):
    """Logits of ids [B, S], read in pieces of the given sizes, over again until all are read."""
    outputs, done = [], 0
    with torch.inference_mode():
        while done < ids.shape[1]:
            piece = ids[:, done : done + pieces[len(outputs) % len(pieces)]]
            outputs.append(model(piece, cache))
            done += piece.shape[1]
    return torch.cat(outputs, dim=1)


def random_ids(model, *shape):
    return torch.randint(0, model.config.vocab_size, shape)


def alone(model, ids, pieces=(MOST,), most=MOST):
    return read(model, Cache(model.config, len(ids), most), ids, pieces)


def in_company(model, ids, start, others, place, pieces):
    """Logits of ids [1, S] from token ``start`` on, read in a batch with random sequences of lengths ``others``."""
    lengths = [*others[:place], start, *others[place:]]
    pool = PagePool(model.config, len(lengths) * -(-2 * MOST // model.config.page_tokens))
    caches = [Cache(model.config, 1, 2 * MOST, pool=pool) for _ in lengths]
    batch = random_ids(model, len(lengths), ids.shape[1] - start)
    batch[place] = ids[0, start:]
    for i, (cache, length) in enumerate(zip(caches, lengths)):
        if length:
            read(model, cache, ids[:, :start] if i == place else random_ids(model, 1, length), [length])
    return read(model, Cache.join(caches), batch, pieces)[place : place + 1]


@pytest.fixture()
def mode():
    """Sets how a network computes, for one test."""
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
    "tokens": st.integers(1, MOST),
    "pieces": st.lists(PIECE, min_size=1, max_size=6),
    "others": st.lists(st.integers(0, MOST), max_size=5),
    "place": st.integers(0, 5),
    "start": st.integers(0, MOST),
}
THOROUGH = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=20, **THOROUGH)
@given(**SITUATIONS)
def test_bits_do_not_depend_on_company_or_pieces(**situation):
    same_bits(**situation)


@pytest.mark.long
@pytest.mark.timeout(1800)
@settings(max_examples=600, **THOROUGH)
@given(**SITUATIONS)
def test_bits_depend_on_company_or_pieces_nowhere(**situation):
    same_bits(**situation)


@pytest.mark.parametrize("name", NETWORKS)
def test_single_tokens_have_the_bits_of_one_piece(name, mode):
    """In eager mode they do not: what the tests above say is not true of itself."""
    model = MODELS[name]
    ids = random_ids(model, 2, 60)
    assert torch.equal(alone(mode(model, "batch-invariant"), ids, [1]), alone(model, ids))
    mode(model, "eager")
    assert not torch.equal(alone(model, ids, [1]), alone(model, ids))


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
    """A choice hides most differences of its scores: here are the scores."""
    rows, original = [], streamed.best_places

    def watch(scores, k):
        rows.extend(scores)
        return original(scores, k)

    monkeypatch.setattr(streamed, "best_places", watch)
    model = mode(build(layers=("csa",), index_format="fp32", index_head_dim=128), "batch-invariant")
    ids, found = random_ids(model, 1, 60), []
    for pieces in ([60], [1], [7, 16]):
        alone(model, ids, pieces)
        found.append(list(rows))
        rows.clear()
    for whole, *others in zip(*found, strict=True):
        assert all(torch.equal(other, whole) for other in others)


def test_bits_are_kept_over_a_long_history(mode):
    """Several tiles of index keys, and of the entries that every query sees."""
    model = mode(build(layers=("csa", "hca", "gqa"), max_positions=1 << 14), "batch-invariant")
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
    """Wide enough that what is done to one tile is shared among threads."""
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


# --- the modes among themselves


class Choices:
    """Every selection that is made while it watches, in order: numbers int64 [queries, k], and how many were ties."""

    def __init__(self, monkeypatch):
        self.numbers, self.tied = [], 0
        original = csa.index_topk

        def watch(*arguments, choose, **options):
            def count_ties(scores, visible, k):
                chosen = choose(scores, visible, k)
                scores = scores.masked_fill(torch.arange(scores.shape[1]) >= visible.unsqueeze(-1), float("-inf"))
                if scores.shape[1] > k:  # as good as the last one chosen, and not chosen
                    last = scores.gather(-1, chosen[:, -1:].clamp(min=0))
                    equal = (scores == last).sum(-1) > (scores.gather(-1, chosen.clamp(min=0)) == last).sum(-1)
                    self.tied += int((equal & (chosen[:, -1] >= 0)).sum())
                return chosen

            self.numbers.append(original(*arguments, choose=count_ties, **options))
            return self.numbers[-1]

        monkeypatch.setattr(csa, "index_topk", watch)

    def take(self):
        numbers, self.numbers = self.numbers, []
        return torch.cat(numbers) if numbers else torch.empty(0)


def assert_close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_eager_is_close_and_chooses_alike(name, mode, monkeypatch):
    choices = Choices(monkeypatch)
    model = build(**{**NETWORKS[name], **EXACT})
    for pieces in ([70], [23, 1, 1, 16, 1]):
        ids = random_ids(model, 1, 70)
        expected = alone(mode(model, "batch-invariant"), ids, pieces)
        chosen = choices.take()
        found = alone(mode(model, "eager"), ids, pieces)
        assert_close(found, expected)
        assert torch.equal(choices.take(), chosen)
    assert choices.tied or name != "one index head"


@pytest.mark.parametrize("name", ["hybrid", "fp4 entries", "one index head"])
def test_released_formats_choose_alike(name, mode, monkeypatch):
    """Where entries are rounded, logits may be a code apart, and still the selection is the same."""
    choices, model = Choices(monkeypatch), MODELS[name]
    ids = random_ids(model, 1, MOST)
    alone(mode(model, "batch-invariant"), ids, [40, 1])
    chosen = choices.take()
    alone(mode(model, "eager"), ids, [40, 1])
    assert torch.equal(choices.take(), chosen)
    assert choices.tied or name != "one index head"


def compiled_is_close(model, mode, monkeypatch, ids, pieces, uncompiled):
    """The first ``uncompiled`` tokens are read eagerly: the mode can be changed at any time."""
    choices, logits, numbers = Choices(monkeypatch), [], []
    for first, then in (("batch-invariant", "batch-invariant"), ("eager", "compiled")):
        cache = Cache(model.config, len(ids), MOST)
        read(mode(model, first), cache, ids[:, :uncompiled], [uncompiled])
        logits.append(read(mode(model, then), cache, ids[:, uncompiled:], pieces))
        numbers.append(choices.take())
    assert_close(logits[1], logits[0])
    assert torch.equal(*numbers)


def test_compiled_decoding_is_close_and_chooses_alike(mode, monkeypatch):
    for seed in range(2):  # the second network, of the same kind, runs the first one's code
        model = build(seed, **{**EXACT, "layers": ("csa",), "index_heads": 1})
        compiled_is_close(model, mode, monkeypatch, random_ids(model, 1, 60), [1], uncompiled=40)
        monkeypatch.undo()


EARLY = [pytest.param(start, name, marks=pytest.mark.long) for start in (0, 1) for name in NETWORKS if name != "hybrid"]


@pytest.mark.parametrize(("start", "name"), [*((30, name) for name in NETWORKS), (0, "hybrid"), (1, "hybrid"), *EARLY])
def test_single_tokens_in_stretches_are_close_and_choose_alike(name, start, mode, monkeypatch):
    """The way that is compiled, as it comes: over every block's completion, and after going back or forking."""
    monkeypatch.setattr(Execution, "function", lambda self, fn, form=None: fn)
    choices = Choices(monkeypatch)
    model = build(**{**NETWORKS[name], **EXACT})
    ids = random_ids(model, 1, start + 45)
    expected = alone(mode(model, "eager"), ids, [start or 1, *[1] * 45])
    numbers = choices.take()
    cache = Cache(model.config, 1, MOST)
    read(model, cache, ids[:, : start or 1], [start or 1])
    read(mode(model, "compiled"), cache, ids[:, start or 1 :], [1])
    assert torch.equal(choices.take(), numbers)
    pool = PagePool(model.config, 40)
    pool.take(3)  # so that pages are no row from the start
    cache = Cache(model.config, 1, MOST, pool=pool, rewind=8)
    found = read(mode(model, "eager"), cache, ids[:, :start], [start]) if start else None
    mode(model, "compiled")
    first = read(model, cache, ids[:, start : start + 20], [1])
    fork = cache.fork()
    read(model, cache, ids[:, :7], [1])  # the twin must not see these
    cache.truncate(start + 20)
    for each in (fork, cache):
        rest = read(model, each, ids[:, start + 20 :], [1])
        together = torch.cat([x for x in (found, first, rest) if x is not None], dim=1)
        assert_close(together, expected)


class Strict:
    """Stands for compiled code: takes only what is of the kind that it met first."""

    def __init__(self, fn, **_):
        self.fn, self.first = fn, None

    def __call__(self, *arguments):
        leaves = tree_flatten(arguments)[0]
        kind = [self.kind(x) if isinstance(x, torch.Tensor) else x for x in leaves]
        kind = [x for x in kind if not isinstance(x, torch.nn.Module)]
        self.first = self.first or kind
        assert kind == self.first
        return self.fn(*arguments)

    @staticmethod
    def kind(x):
        return x.shape, [step for n, step in zip(x.shape, x.stride()) if n > 1], x.dtype


@pytest.fixture()
def strict(monkeypatch):
    monkeypatch.setattr(torch, "compile", Strict)
    execution._code.cache_clear()
    yield
    execution._code.cache_clear()


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_code_meets_what_it_was_made_for(name, mode, strict):
    model = mode(build(**NETWORKS[name]), "compiled")
    ids = random_ids(model, 1, MOST)
    with torch.inference_mode():
        model(ids[:, :8])
        model(ids[:, :1], Cache(model.config, 1, 8), telemetry=Telemetry())
    pool = PagePool(model.config, 60)
    for kind in ({}, {"rewind": 9}, {"pool": pool}):
        each = Cache(model.config, 1, 2 * MOST, **kind)
        read(model, each, ids[:, :60], [8, 1, 5, 8, 1, 1, 30, 7])
        read(model, each.fork(), ids[:, :9], [1, 8])
        joined = Cache.join([each.fork(), each.fork()])
        read(model, joined, ids[:, :20].expand(2, -1), [4, 1, 3, 1])
        read(model, joined.split()[1], ids[:, :9], [1, 8])
        read(model, each, ids[:, :20], [1, 8, 1])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["fp32", "odd ratios", "gqa", "dense", "plain residual", "one index head"])
def test_compiled_is_close_and_chooses_alike(name, mode, monkeypatch):
    model = build(**{**NETWORKS[name], **EXACT})
    compiled_is_close(model, mode, monkeypatch, random_ids(model, 1, 100), [8, 29, 1, 1], uncompiled=16)
    ids = random_ids(model, 3, 50)
    expected = alone(mode(model, "batch-invariant"), ids, [21, 1])
    assert_close(alone(mode(model, "compiled"), ids, [21, 1]), expected)


def test_unknown_modes_are_named():
    with pytest.raises(ConfigError, match="execution: 'fast' is not one of eager, compiled, batch-invariant"):
        Execution("fast")
    assert Execution().mode == "eager"
    with pytest.raises(ValueError, match=r"execution: expected an Execution, .* found 'compiled'"):
        build().execution = "compiled"


@pytest.mark.parametrize(("width", "size"), [("hidden_size", 37), ("head_dim", 18), ("expert_size", 13)])
def test_widths_that_cannot_keep_their_bits_are_named(width, size):
    model = build(**{width: size})
    with pytest.raises(ConfigError, match=f"widths that are multiples of 4, model.{width} is {size}"):
        model.execution = Execution("batch-invariant")
    assert model.execution.mode == "eager"


def test_without_a_cache_the_bits_are_those_of_one(mode):
    model = mode(MODELS["hybrid"], "batch-invariant")
    ids = random_ids(model, 2, 50)
    with torch.inference_mode():
        assert torch.equal(model(ids), alone(model, ids, [7]))
        for refused in ({"attention": "dense"}, {"positions": torch.arange(50).expand(2, 50)}):
            with pytest.raises(ValueError, match="batch-invariant mode knows no packed documents"):
                model(ids, **refused)


def test_gradients_recorded_outside_training(mode):
    model = build().eval()
    ids = random_ids(model, 1, 30)
    found = []
    for name in ("eager", "compiled"):
        model.zero_grad()
        mode(model, name)(ids).square().mean().backward()
        found.append(model.embed.weight.grad)
    assert_close(*found)
    recorded = mode(model, "batch-invariant")(ids).detach()  # from a cache, which passes none on
    assert torch.equal(recorded, alone(model, ids))


def test_training_is_the_same_in_every_mode(mode):
    model = build().train()
    ids = torch.randint(0, SMALL["vocab_size"], (2, 30))
    expected = model(ids)
    for name in ("compiled", "batch-invariant"):
        assert torch.equal(mode(model, name)(ids), expected)
