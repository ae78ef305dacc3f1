"""Decode steps recorded on a CPU equal others, bit for bit."""

import pytest
import torch

from kernels import native
from model.cache import Cache
from model.cache.file import restore_cache, save_cache
from model.cache.pages import PagePool
from model.decode_graphs import DecodeGraphs, unsupported_reason
from model.generation import generate, prefill
from tests.model.networks import EXACT, build, random_ids
from tests.model.replayed_steps import BAKES, bake_positions, decode, make_lengths_a_tensor, read_lengths

pytestmark = pytest.mark.skipif(native.level() is None, reason="native operators are not built")

NETWORKS = {
    "hybrid": {"layers": ["sliding", "csa", "hca"], "num_hash_layers": 1},
    "plain residuals": {
        "layers": ["csa", "hca"],
        "hyper_connections": False,
        "num_hash_layers": 0,
        "first_k_dense_replace": 1,
    },
    "unrounded": {"layers": ["csa", "hca"], **EXACT},
    "latent": {"layers": ["dsa", "mla"], "index_format": "fp8_128", "kv_format": "fp8_128"},
    "grouped-query": {"layers": ["gqa", "csa"]},
}


def caches_of(model, lengths, pool=None):
    """Return two equal caches of sequences of these lengths, which share no page that either writes to."""
    pool = pool or PagePool(model.config, 40)
    caches = [Cache(model.config, 1, 400, pool=pool) for _ in lengths]
    for i, (cache, length) in enumerate(zip(caches, lengths)):
        prefill(model, cache, random_ids(1, length, seed=i))
    cache = Cache.join(caches)
    return cache, cache.fork()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_replayed_steps_equal_others(name, dtype):
    """Over two periods of the compression ratios and a page border, for sequences of different lengths."""
    model = build(**NETWORKS[name])
    model.cast_weights(dtype)
    size, period = model.config.page_tokens, model.config.hca_ratio
    cache, expected = caches_of(model, [size - 3, 5])
    graphs = DecodeGraphs.if_supported(model, 3)
    decode(model, graphs, cache, expected, 2 * period + 2)
    assert len(graphs) == 2 and graphs.records  # tables of one page and of two
    assert cache.lengths[0] > size


def test_sequences_leave_and_join():
    """Batches of other sizes have other recordings, and the fixed state of each is where its recording expects it."""
    model = build(**NETWORKS["hybrid"])
    cache, expected = caches_of(model, [9, 30, 17])
    graphs = DecodeGraphs.if_supported(model, 3)
    decode(model, graphs, cache, expected, 3)
    cache, expected = cache.take([2, 0]), expected.take([2, 0])
    decode(model, graphs, cache, expected, 5)
    one, other = caches_of(model, [22], cache.pool)
    decode(model, graphs, one, other, 3)  # the first cache moves out
    decode(model, graphs, cache, expected, 2)  # and in again
    assert len(graphs) == 3


def test_two_networks_may_share_a_cache():
    """Steps of each are recorded with memory of its own, to which the state moves."""
    model, other = (build(**NETWORKS["hybrid"]) for _ in range(2))
    cache, expected = caches_of(model, [9, 30])
    recorded = [(one, DecodeGraphs.if_supported(one, 2)) for one in (model, other)]
    for _ in range(3):
        for one, graphs in recorded:
            decode(one, graphs, cache, expected, 3)
    assert all(len(graphs) == 1 for _, graphs in recorded)


def test_more_sequences_than_can_be_recorded_run_normally():
    """Beyond some number of tokens, experts run in operators whose shapes depend on the router."""
    model = build(**NETWORKS["hybrid"])
    graphs = DecodeGraphs.if_supported(model, 1000)
    assert graphs.max_batch < 1000
    pool = PagePool(model.config, 400)
    for batch in (17, graphs.max_batch, graphs.max_batch + 1):
        cache = Cache(model.config, batch, 20, pool=pool)
        decode(model, graphs, cache, cache.fork(), 3)
    assert len(graphs) == 2 and graphs.records


def test_a_bound_cache_can_be_used_in_all_other_ways(tmp_path):
    """Between replays: prompts, truncation, forks, files, and another number of threads."""
    model = build(**NETWORKS["hybrid"])
    pool = PagePool(model.config, 60)
    cache = Cache(model.config, 1, 400, pool=pool, rewind=4)
    expected, graphs = cache.fork(), DecodeGraphs.if_supported(model, 2)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            for one in (cache, expected):
                prefill(model, one, random_ids(1, 7, seed=threads))
            decode(model, graphs, cache, expected, 5)
            for one in (cache, expected):
                one.truncate(one.length - 3)
            decode(model, graphs, cache, expected, 2)
    finally:
        torch.set_num_threads(before)
    decode(model, graphs, cache.fork(), expected.fork(), 3)
    decode(model, graphs, cache, expected, 2)
    save_cache(cache, tmp_path / "cache.safetensors")
    loaded = Cache(model.config, 1, 400, pool=pool, rewind=4)
    restore_cache(loaded, tmp_path / "cache.safetensors")
    decode(model, graphs, loaded, expected.fork(), 3)
    decode(model, graphs, cache, expected, 2)
    assert len(graphs) >= 1 and graphs.records


def test_caches_that_were_bound_need_no_inference_mode():
    """Writes to inference tensors outside inference mode would raise RuntimeError."""
    model = build(**NETWORKS["hybrid"])
    pool = PagePool(model.config, 20)
    caches = [Cache(model.config, 1, 50, pool=pool) for _ in range(2)]
    graphs = DecodeGraphs.if_supported(model, 1)
    for cache in (caches[0], caches[0], caches[0], caches[1]):
        graphs.logits(random_ids(1, 1), cache)
    caches[0].truncate(0)
    caches[1].release()


def test_wrong_ids_change_nothing():
    model = build(**NETWORKS["hybrid"])
    cache, graphs = Cache(model.config, 1, 50), DecodeGraphs.if_supported(model, 1)
    for _ in range(3):
        for ids, reason in (
            (torch.tensor([[50]]), "do not all lie in a vocabulary of 50"),
            (torch.tensor([[-1]]), "do not all lie in a vocabulary of 50"),
            (torch.tensor([[1, 2]]), "expected one token per sequence"),
            (torch.tensor([[0.5]]), "expected integers"),
        ):
            with pytest.raises(ValueError, match=reason):
                graphs.logits(ids, cache)
        graphs.logits(random_ids(1, 1), cache)
    assert cache.length == 3 and len(graphs) == 1


@pytest.mark.parametrize("bake", BAKES)
def test_a_number_of_python_in_a_recorded_step_is_noticed(bake, monkeypatch):
    model = build(**NETWORKS["hybrid"])
    cache, expected = caches_of(model, [20, 20] if bake is bake_positions else [20, 5])
    graphs = DecodeGraphs.if_supported(model, 2)
    bake(monkeypatch)
    with pytest.raises(AssertionError):
        decode(model, graphs, cache, expected, 3)
        decode(model, graphs, expected, cache, 4)  # which have other pages
    assert graphs.records and len(graphs)


@pytest.mark.parametrize(
    ("break_step", "reason"),
    [
        (make_lengths_a_tensor, "a tensor is made from values of Python"),
        (read_lengths, "aten::is_nonzero returns a value to Python"),
    ],
)
def test_a_step_that_cannot_be_recorded_runs_normally(break_step, reason, monkeypatch, caplog):
    model = build(**NETWORKS["hybrid"])
    cache, expected = caches_of(model, [20, 5])
    graphs = DecodeGraphs.if_supported(model, 2)
    break_step(monkeypatch)
    decode(model, graphs, cache, expected, 10)
    assert not graphs.records and not len(graphs)
    assert caplog.messages == [f"decode steps are not recorded: {reason}"]


def test_networks_without_recorded_steps_are_named(caplog):
    assert unsupported_reason(build(layers=["csa", "hca"])) == ""
    convolved = build(layers=["gqa"], mixer_options={"gqa": {"conv_kernel": 3}})
    assert unsupported_reason(convolved) == "steps of 'gqa' layers depend on the lengths of the sequences"
    assert DecodeGraphs.if_supported(build(layers=["csa", "kda"]), 4) is None and not caplog.messages
    narrow = build(layers=["csa", "hca"])
    narrow.cast_weights(torch.float16)  # experts then run in operators whose shapes depend on the router
    assert unsupported_reason(narrow) == "the native operators read expert weights in float32 and BF16 only"


def test_generation_replays_steps(monkeypatch):
    model, lengths = build(**NETWORKS["hybrid"]), []
    prompt = random_ids(2, 9)
    run = DecodeGraphs.logits

    def counted(graphs, ids, cache):
        logits = run(graphs, ids, cache)
        lengths.append(len(graphs))
        return logits

    monkeypatch.setattr(DecodeGraphs, "logits", counted)
    found = generate(model, prompt, 12)
    assert lengths == [0] + [1] * 10
    monkeypatch.setattr(DecodeGraphs, "if_supported", lambda *_: None)
    assert torch.equal(generate(model, prompt, 12), found)
