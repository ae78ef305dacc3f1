"""The public cache operations: after any sequence of them, logits equal those of a forward pass without a cache."""

import gc
import weakref

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from safetensors import safe_open
from safetensors.torch import save_file

from model.cache import Cache
from model.cache.file import restore_cache, save_cache
from model.cache.pages import PagePool
from model.config import ModelConfig
from model.costs import cache_bytes_per_token, fixed_state_bytes
from model.errors import CacheError
from model.forward.execution import Execution
from model.generation import prefill
from tests.model.networks import EXACT, FP32, SMALL, build

NETWORKS = {
    "hybrid": {},
    "wide window": {"window": 20, "csa_ratio": 3, "hca_ratio": 6},
    "one-token window": {"window": 1, "layers": ("csa", "hca")},
    "baseline": {"layers": ("gqa", "sliding")},
    "recurrent": {"layers": ("mamba2", "csa")},
    "delta rule": {"layers": ("hca", "kda")},
    "latents": {"layers": ("mla", "dsa")},
    "latents and entries": {"layers": ("dsa", "csa", "mla", "hca")},
}
MODELS = {name: build(**{**EXACT, **change}) for name, change in NETWORKS.items()}
INVARIANT = {name: build(**change) for name, change in NETWORKS.items()}
"""Networks with the released formats. Batch-invariant execution is bit-exact, so the tests need no tolerances."""
for _model in INVARIANT.values():
    _model.execution = Execution("batch-invariant")
MAX_TOKENS = 150


def logits_of(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens]))[0, -1]


class CacheMachine(RuleBasedStateMachine):
    """Sequences of one page pool: appended to in any order and batch, truncated, forked, saved and restored."""

    @initialize(
        models=st.sampled_from([MODELS, INVARIANT]),
        name=st.sampled_from(sorted(NETWORKS)),
        rewind=st.sampled_from([0, 5]),
        seed=st.integers(0, 99),
    )
    def start(self, models, name, rewind, seed):
        self.model, self.rewind = models[name], rewind
        self.generator = torch.Generator().manual_seed(seed)
        self.pool = PagePool(self.model.config, 40)
        self.caches, self.tokens = [], []
        self.new_sequence()

    @precondition(lambda self: len(self.caches) < 5)
    @rule()
    def new_sequence(self):
        self.caches.append(Cache(self.model.config, 1, MAX_TOKENS, pool=self.pool, rewind=self.rewind))
        self.tokens.append([])

    @rule(data=st.data(), count=st.one_of(st.just(1), st.integers(1, 40)))
    def read_on(self, data, count):
        """Append an equal number of tokens to some of the sequences in one batch."""
        chosen = data.draw(st.lists(st.sampled_from(range(len(self.caches))), unique=True, min_size=1))
        chosen = [i for i in chosen if len(self.tokens[i]) + count <= MAX_TOKENS]
        if not chosen:
            return
        ids = torch.randint(0, SMALL["vocab_size"], (len(chosen), count), generator=self.generator)
        batch = Cache.join([self.caches[i] for i in chosen])
        with torch.inference_mode():
            logits = self.model(ids, batch)
        for row, (i, part) in enumerate(zip(chosen, batch.split())):
            self.caches[i] = part
            self.tokens[i] = self.tokens[i] + ids[row].tolist()
            expected = logits_of(self.model, self.tokens[i])
            if self.model.execution.batch_invariant:  # computed in one piece with a separate cache
                assert torch.equal(logits[row, -1], expected)
            else:
                torch.testing.assert_close(logits[row, -1], expected, rtol=1e-3, atol=2e-4)

    @rule(data=st.data(), share=st.floats(0, 1))
    def truncate(self, data, share):
        i = data.draw(st.sampled_from(range(len(self.caches))))
        cache, length = self.caches[i], len(self.tokens[i])
        target = round(share * length) if share < 0.5 else max(0, length - round((share - 0.5) * 12))
        try:
            cache.truncate(target)
        except CacheError as error:
            # Rings keep their last positions, recurrent states those at the ends of calls.
            recurrent = not {"mamba2", "kda"}.isdisjoint(self.model.config.layers)
            assert 0 < target < (length if recurrent else cache.high_water_marks[0] - self.rewind), error
            assert cache.length == length
        else:
            self.tokens[i] = self.tokens[i][:target]

    @precondition(lambda self: len(self.caches) < 5)
    @rule(data=st.data())
    def fork(self, data):
        i = data.draw(st.sampled_from(range(len(self.caches))))
        self.caches.append(self.caches[i].fork())
        self.tokens.append(self.tokens[i])

    @precondition(lambda self: len(self.caches) > 1)
    @rule(data=st.data())
    def drop(self, data):
        i = data.draw(st.sampled_from(range(len(self.caches))))
        self.caches.pop(i).release()
        self.tokens.pop(i)

    @rule(data=st.data())
    def save_and_restore(self, data):
        i = data.draw(st.sampled_from(range(len(self.caches))))
        save_cache(self.caches[i], self.folder / "cache.safetensors")
        self.caches[i].release()
        self.caches[i] = Cache(self.model.config, 1, MAX_TOKENS, pool=self.pool, rewind=self.rewind)
        restore_cache(self.caches[i], self.folder / "cache.safetensors")
        assert self.caches[i].length == len(self.tokens[i])

    @invariant()
    def no_page_is_lost(self):
        if hasattr(self, "caches"):
            held = {page for cache in self.caches for pages in cache._table.pages for page in pages}
            assert len(held) + self.pool.free_pages == self.pool.pages


def run_machine(tmp_path, examples, steps):
    CacheMachine.folder = tmp_path
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_interleaved_operations_keep_the_logits(tmp_path):
    run_machine(tmp_path, examples=40, steps=25)


@pytest.mark.long
def test_many_long_interleaved_operations_keep_the_logits(tmp_path):
    run_machine(tmp_path, examples=400, steps=60)


def filled(model, tokens, seed=0, **options):
    torch.manual_seed(seed)
    ids = torch.randint(0, SMALL["vocab_size"], (1, tokens))
    cache = Cache(model.config, 1, MAX_TOKENS, **options)
    with torch.inference_mode():
        model(ids, cache)
    return cache, ids[0].tolist()


def next_logits(model, cache, token=7):
    with torch.inference_mode():
        return model(torch.tensor([[token]] * cache.batch_size), cache)[:, -1]


def test_a_rewind_cannot_be_used_twice():
    cache, _ = filled(MODELS["hybrid"], 60, rewind=5)
    cache.truncate(55)
    with pytest.raises(CacheError, match=r"cannot truncate from 55 to 50 tokens.*can resume at 5[345] or later only"):
        cache.truncate(50)
    next_logits(MODELS["hybrid"], cache)
    with pytest.raises(CacheError, match="cannot truncate from 56 to 50"):
        cache.truncate(50)


def test_each_sequence_of_a_batch_can_go_back_by_itself():
    model = MODELS["hybrid"]
    torch.manual_seed(0)
    ids = torch.randint(0, SMALL["vocab_size"], (3, 30))
    cache = Cache(model.config, 3, MAX_TOKENS, rewind=6)
    with torch.inference_mode():
        model(ids, cache)
    cache.truncate([30, 25, 0])
    with pytest.raises(CacheError, match=r"different lengths: \[30, 25, 0\]"):
        _ = cache.length
    found = next_logits(model, cache)
    for row, length in enumerate((30, 25, 0)):
        expected = logits_of(model, [*ids[row, :length].tolist(), 7])
        torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=2e-4)
    with pytest.raises(CacheError, match="2 lengths given for 3 sequences"):
        cache.truncate([1, 2])


def test_an_exhausted_pool_is_refused_and_the_cache_stays_as_it_was():
    model = MODELS["hybrid"]
    pool = PagePool(model.config, 2)
    torch.manual_seed(0)
    ids = torch.randint(0, SMALL["vocab_size"], (1, MAX_TOKENS))
    cache = Cache(model.config, 1, MAX_TOKENS, pool=pool)
    with torch.inference_mode():
        model(ids[:, :70], cache)
        needed = r"pool is exhausted: 2 more needed, 1 of 2 free \(pages of 72 tokens\)"
        with pytest.raises(CacheError, match=needed):
            model(ids[:, 70:], cache)
        with pytest.raises(CacheError, match="81 more tokens do not fit: the cache holds 70 of at most 150"):
            model(ids[:, :81], cache)
        assert cache.length == 70 and pool.free_pages == 1
        logits = model(ids[:, 70:140], cache)[0, -1]
    expected = logits_of(model, ids[0, :140].tolist())
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=2e-4)


def test_what_cannot_be_read_changes_nothing():
    model = MODELS["hybrid"]
    pool = PagePool(model.config, 2)
    cache = Cache(model.config, 1, MAX_TOKENS, pool=pool)
    with pytest.raises(ValueError, match="do not all lie in a vocabulary"), torch.inference_mode():
        model(torch.tensor([[3, SMALL["vocab_size"]]]), cache)
    with pytest.raises(CacheError, match="3 more needed, 2 of 2 free"):
        prefill(model, cache, torch.zeros(1, MAX_TOKENS, dtype=torch.int64), chunk=10)
    assert cache.length == 0 and pool.free_pages == 2
    torch.testing.assert_close(next_logits(model, cache)[0], logits_of(model, [7]), rtol=1e-3, atol=2e-4)


def test_a_forks_complete_pages_are_shared():
    model = MODELS["hybrid"]
    pool = PagePool(model.config, 10)
    cache, _ = filled(model, 100, pool=pool)
    assert pool.free_pages == 8
    twin = cache.fork()
    assert pool.free_pages == 8
    next_logits(model, twin)
    assert pool.free_pages == 7  # the half-filled page is copied, the complete one is not
    next_logits(model, cache)
    assert pool.free_pages == 7
    twin.release()
    assert pool.free_pages == 8


def test_a_fork_of_a_reserved_cache_has_the_same_capacity():
    model = MODELS["hybrid"]
    cache, tokens = filled(model, 100)
    twin = cache.fork()
    rest = torch.randint(0, SMALL["vocab_size"], (1, 50))
    with torch.inference_mode():
        for each in (twin, cache):
            logits = model(rest, each)[0, -1]
            expected = logits_of(model, tokens + rest[0].tolist())
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=2e-4)


@pytest.fixture()
def saved(tmp_path):
    path = tmp_path / "cache.safetensors"
    cache, tokens = filled(MODELS["hybrid"], 100)
    save_cache(cache, path)
    return path, cache, tokens


def test_saved_bits_come_back(saved, tmp_path):
    path, cache, _ = saved
    again = Cache(cache.config, 1, MAX_TOKENS)
    restore_cache(again, path)
    assert torch.equal(next_logits(MODELS["hybrid"], cache), next_logits(MODELS["hybrid"], again))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_restored_cache_remembers_which_rows_were_overwritten(tmp_path):
    path = tmp_path / "cache.safetensors"
    cache, _ = filled(MODELS["hybrid"], 40, rewind=8)
    cache.truncate(33)
    save_cache(cache, path)
    again = Cache(cache.config, 1, MAX_TOKENS, rewind=8)
    restore_cache(again, path)
    for each in (cache, again):
        with pytest.raises(CacheError, match="cannot truncate from 33 to 25"):
            each.truncate(25)
    assert torch.equal(next_logits(MODELS["hybrid"], cache), next_logits(MODELS["hybrid"], again))


def damage(path, change):
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    save_file(tensors, path, metadata=metadata)


def test_saved_caches_that_do_not_fit_are_named(saved):
    path, cache, _ = saved
    config = cache.config

    def refused(message, into=None):
        into = into or Cache(config, 1, MAX_TOKENS)
        with pytest.raises(CacheError, match=message):
            restore_cache(into, path)
        assert into.length == 0

    refused("100 more tokens do not fit", Cache(config, 1, 90))
    refused("index_topk is 3 there, 4 here", Cache(config.replace(index_topk=4), 1, MAX_TOKENS))
    refused("saved with a rewind of 0 tokens, the cache has 3", Cache(config, 1, MAX_TOKENS, rewind=3))
    with pytest.raises(CacheError, match="only an empty cache of one sequence"):
        restore_cache(cache, path)
    with pytest.raises(CacheError, match="holds one sequence's cache, this one holds 2"):
        save_cache(Cache(config, 2, MAX_TOKENS), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10] + b"0123456789")
    refused("the checksum does not match")
    path.write_bytes(whole[: len(whole) // 2])
    refused("damaged or not a safetensors file")
    for change, message in (
        (lambda metadata, tensors: metadata.pop("length"), "not a saved cache"),
        (lambda metadata, tensors: metadata.update(length="101"), "not a saved cache|the checksum does not match"),
        (lambda metadata, tensors: metadata.update(length="-5"), "not a saved cache"),
        (lambda metadata, tensors: metadata.update(model="[]"), "not a saved cache"),
        (lambda metadata, tensors: tensors.update(more=torch.tensor(3.0)), "the checksum does not match"),
    ):
        path.write_bytes(whole)
        damage(path, change)
        refused(message)
    path.unlink()
    refused("no such file")


@pytest.mark.parametrize("rewind", [0, 7])
@pytest.mark.parametrize("formats", [{}, FP32], ids=["released", "fp32"])
def test_bytes_are_the_closed_form_and_follow_the_tokens(rewind, formats):
    config = ModelConfig(**{**SMALL, **formats})
    pool = PagePool(config, 8)
    cache = Cache(config, 2, MAX_TOKENS, pool=pool, rewind=rewind)
    for name, expected in fixed_state_bytes(config, rewind).items():
        assert cache.nbytes(name) == 2 * expected
    cache.begin(2, 80)  # two pages of 72 tokens each
    cache.advance()
    for name, per_token in cache_bytes_per_token(config).items():
        assert cache.nbytes(name) == 4 * pool.page_tokens * per_token, name
    assert cache.nbytes() == sum(map(cache.nbytes, cache.components))
    cache.truncate(0)
    assert cache.nbytes("csa") == 0 and pool.free_pages == 8


def test_a_negative_number_of_pages_is_refused():
    with pytest.raises(CacheError, match="a pool cannot have -1 pages"):
        PagePool(MODELS["hybrid"].config, -1)


def test_joining_the_same_cache_twice_is_refused():
    cache, _ = filled(MODELS["hybrid"], 10)
    for caches in ([cache, cache], []):
        with pytest.raises(CacheError, match="expected one or more distinct caches"):
            Cache.join(cache for cache in caches)


def test_forks_within_one_batch_copy_a_shared_page_once_less():
    model = MODELS["hybrid"]
    pool = PagePool(model.config, 2)
    cache, tokens = filled(model, 30, pool=pool)
    batch = Cache.join([cache.fork(), cache.split()[0]])
    found = next_logits(model, batch)
    assert pool.free_pages == 0
    for row in found:
        torch.testing.assert_close(row, logits_of(model, [*tokens, 7]), rtol=1e-3, atol=2e-4)


def test_a_fork_made_in_inference_mode_can_be_used_outside():
    cache, _ = filled(MODELS["hybrid"], 30)
    with torch.inference_mode():
        twin = cache.fork()
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(MODELS["hybrid"](ids, cache), MODELS["hybrid"](ids, twin))


def test_deleting_a_cache_frees_its_memory_at_once():
    model = MODELS["hybrid"]
    gc.disable()
    try:
        pool = PagePool(model.config, 4)
        cache, _ = filled(model, 100, pool=pool)
        twin = cache.fork()
        del cache
        assert pool.free_pages == 2
        forgotten = weakref.ref(twin.layers[1].window.data)
        del twin
        assert pool.free_pages == 4 and forgotten() is None
    finally:
        gc.enable()


def test_forking_again_and_again_needs_no_more_memory():
    cache, _ = filled(MODELS["hybrid"], 100)
    for _ in range(5):
        next_logits(MODELS["hybrid"], cache.fork())
    pages = cache.pool.pages
    for _ in range(5):
        next_logits(MODELS["hybrid"], cache.fork())
    assert cache.pool.pages == pages


def test_an_interrupted_step_is_noticed(tmp_path):
    model = MODELS["hybrid"]
    cache, tokens = filled(model, 60)
    ids = torch.randint(0, SMALL["vocab_size"], (1, 40))

    def fail(*_):
        raise RuntimeError("lost power")

    with torch.inference_mode():
        handle = model.layers[2].ffn.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="lost power"):
            model(ids, cache)
        handle.remove()
        assert cache.length == 60
        for attempt in (lambda: model(ids, cache), lambda: save_cache(cache, tmp_path / "cache.safetensors")):
            with pytest.raises(CacheError, match="sequence 0 cannot continue from 60 tokens: a step was interrupted"):
                attempt()
        assert not list(tmp_path.iterdir())
        cache.truncate(0)
        model(torch.tensor([tokens]), cache)
    expected = logits_of(model, [*tokens, 7])
    torch.testing.assert_close(next_logits(model, cache)[0], expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("mode", ["auto", "batch-invariant"])
def test_nan_left_by_a_sequence_does_not_reach_later_ones(mode):
    model = build(layers=("sliding", "csa", "hca"))
    model.execution = Execution(mode)
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    clean = torch.randint(8, 50, (1, 60), generator=torch.Generator().manual_seed(2))
    broken = clean.clone()
    broken[0, ::5] = 7
    pool = PagePool(model.config, pages=8)
    first = Cache(model.config, 1, 96, pool=pool)
    assert prefill(model, first, broken).isnan().any()
    del first
    for tokens in (2, 60):
        assert prefill(model, Cache(model.config, 1, 96, pool=pool), clean[:, :tokens]).isfinite().all()
    again = Cache(model.config, 1, 96)
    prefill(model, again, broken)
    again.truncate(0)
    assert prefill(model, again, clean[:, :2]).isfinite().all()


def test_a_cache_keeps_no_graph_alive():
    model = build(layers=("sliding", "csa", "hca"))
    caches = [Cache(model.config, 1, 32, pool=pool) for pool in [PagePool(model.config, pages=8)] * 2]
    for cache in caches:
        model(torch.tensor([[5, 6, 7]]), cache)
    assert not any(tensor.requires_grad for tensor in caches[0]._fixed_tensors())
    assert Cache.join(caches).lengths == [3, 3]


def test_a_prompt_with_an_invalid_token_id_changes_nothing():
    model = build()
    cache = Cache(model.config, 1, 64)
    ids = torch.ones(1, 30, dtype=torch.int64)
    ids[0, 25] = 50
    with pytest.raises(ValueError, match="input_ids: 1 to 50 do not all lie in a vocabulary of 50"):
        prefill(model, cache, ids, chunk=10)
    assert cache.lengths == [0]
