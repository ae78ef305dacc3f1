"""Recorded decode steps. The recordings themselves are tested in a process of their own, ``recorded_decoding.py``."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from model.cache import Cache
from model.cache.pages import PagePool
from model.decode_graphs import CudaGraphRecorder, DecodeGraphs, unsupported_reason
from model.errors import CacheError
from model.forward.execution import Execution
from model.generation import prefill
from model.mixers.gqa import GroupedQueryAttention
from model.transformer import Transformer
from tests.model.networks import build, random_ids
from tests.model.rerun import rerun

HERE = Path(__file__).parent


def test_recorded_steps_equal_others():
    pytest.importorskip("triton")
    settings = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    settings.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    found = subprocess.run(
        [*command, str(HERE / "recorded_decoding.py")],
        cwd=HERE.parents[1],
        env=settings,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-1000:]


@pytest.mark.parametrize("layers", [["csa", "hca", "sliding"], ["mla", "dsa"], ["sliding"]])
@torch.inference_mode()
def test_the_operators_of_a_cpu_compute_the_same_at_fixed_addresses(layers):
    model = build(layers=layers)
    pool = PagePool(model.config, 20)
    caches = [Cache(model.config, 1, 200, pool=pool) for _ in range(2)]
    for cache, length in zip(caches, (61, 6)):
        prefill(model, cache, random_ids(1, length))
    cache = Cache.join(caches)
    expected = cache.fork()
    graphs = DecodeGraphs(model, 2, rerun)
    for ids in random_ids(2, 30).split(1, dim=1):
        assert torch.equal(graphs.logits(ids, cache), model(ids, expected))
    assert len(graphs) and cache.lengths == expected.lengths == [91, 36]
    forked = cache.fork()  # sequences can leave the addresses
    cache.truncate(0)
    ids = random_ids(2, 3)
    assert torch.equal(model(ids, forked), model(ids, expected))


@torch.inference_mode()
def test_tokens_that_do_not_fit_change_nothing():
    model = build(layers=["csa", "hca"])
    cache = Cache(model.config, 1, 12)
    prefill(model, cache, random_ids(1, 10))
    graphs = DecodeGraphs(model, 1, rerun)
    ids = random_ids(1, 1)
    for _ in range(2):
        graphs.logits(ids, cache)
    with pytest.raises(CacheError, match="1 more tokens do not fit"):
        graphs.logits(ids, cache)
    assert cache.lengths == [12]


@torch.inference_mode()
def test_caches_that_do_not_suit_the_recorded_steps_are_refused_unchanged():
    model = build(layers=["csa", "hca"])
    pool = PagePool(model.config, 20)
    graphs = DecodeGraphs(model, 1, rerun)
    first = Cache(model.config, 1, 50, pool=pool)
    graphs.logits(random_ids(1, 1), first)
    for options, reason in (({"pool": pool, "rewind": 2}, "rewind"), ({}, "page pool")):
        cache = Cache(model.config, 1, 50, **options)
        free = cache.pool.free_pages
        with pytest.raises(CacheError, match=reason):
            graphs.logits(random_ids(1, 1), cache)
        assert cache.pool.free_pages == free and cache.lengths == cache.high_water_marks == [0]
    graphs.logits(random_ids(1, 1), first)
    assert first.lengths == [2]


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, IndexError])
@torch.inference_mode()
def test_after_any_failure_steps_run_normally_for_good(kind, caplog):
    def fail(function):
        function()
        attempts.append(function)
        raise kind("the reason\nand more")

    model, attempts = build(layers=["csa", "hca"]), []
    cache = Cache(model.config, 1, 50)
    expected, graphs = cache.fork(), DecodeGraphs(model, 1, fail)
    for ids in random_ids(1, 10).split(1, dim=1):
        assert torch.equal(graphs.logits(ids, cache), model(ids, expected))
    assert len(attempts) == 1 and not graphs.records and not cache._table.has_fixed_shape
    assert caplog.messages == [f"decode steps are not recorded: recording a step failed ({kind.__name__}: the reason)"]


@torch.inference_mode()
def test_steps_are_recorded_anew_after_the_pool_has_grown():
    model = build(layers=["csa", "hca"])
    cache = Cache(model.config, 1, 50)
    expected, graphs = cache.fork(), DecodeGraphs(model, 1, rerun)
    steps = random_ids(1, 6).split(1, dim=1)
    for ids in steps[:3]:
        assert torch.equal(graphs.logits(ids, cache), model(ids, expected))
    assert len(graphs) == 1
    cache.pool.grow(3)
    for ids, recorded in zip(steps[3:], (0, 1, 1)):
        assert torch.equal(graphs.logits(ids, cache), model(ids, expected))
        assert len(graphs) == len(graphs._steps) - 1 + recorded == recorded


@torch.inference_mode()
def test_only_bound_caches_have_steps_of_fixed_shape():
    model = build(layers=["csa", "hca"])
    caches = [Cache(model.config, 1, 50, pool=PagePool(model.config, 20))]
    caches.append(caches[0].fork())
    graphs = DecodeGraphs(model, 1, rerun)
    for cache, bound in ((None, [False, False]), (caches[0], [True, False]), (caches[1], [False, True])):
        if cache is not None:
            graphs.logits(random_ids(1, 1), cache)
        assert [c._table.has_fixed_shape for c in caches] == bound


@torch.inference_mode()
def test_the_bytes_of_a_bound_cache_do_not_include_memory_of_other_sequences():
    model = build(layers=["csa", "hca", "sliding"])
    cache = Cache(model.config, 2, 50)
    expected, graphs = cache.nbytes(), DecodeGraphs(model, 16, rerun)
    graphs.logits(random_ids(2, 1), cache)
    assert cache.nbytes() == expected


def test_a_recording_runs_on_the_device_of_the_network(monkeypatch):
    """One at a time, also of several networks."""
    captures, threads, barrier = [], [], threading.Barrier(2)

    class Graph:
        def pool(self):
            return "pool of a graph"

        def replay(self):
            pass

    @contextlib.contextmanager
    def device(number):
        threads.append(threading.get_ident())
        yield captures.append(number)

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        captures.append((pool, stream))
        yield
        assert threads[-1] == threading.get_ident()  # no other capture has begun

    for name, value in {
        "CUDAGraph": Graph,
        "Stream": "stream of {}".format,
        "device": device,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    recorder = CudaGraphRecorder(torch.device("cuda:1"))
    kept = [recorder(lambda: torch.zeros(1)) for _ in range(2)]
    del kept
    recorder(lambda: torch.zeros(1))
    here, stream = torch.device("cuda:1"), "stream of cuda:1"
    assert captures == [here, (None, stream), here, ("pool of a graph", stream), here, (None, stream)]

    def record():
        barrier.wait()
        CudaGraphRecorder(here)(lambda: time.sleep(0.05))
        finished.append(True)

    finished = []
    running = [threading.Thread(target=record) for _ in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(finished) == 2


def test_networks_without_recorded_steps_on_a_gpu_are_named(monkeypatch, caplog):
    model = build(layers=["csa", "hca"])
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    assert unsupported_reason(model).startswith("the Triton kernels do not support this GPU")
    monkeypatch.setattr("model.decode_graphs.can_run", lambda x: True)
    assert unsupported_reason(model).startswith("with float32 weights, attention and experts")
    model.cast_weights(torch.bfloat16)
    assert unsupported_reason(model) == ""
    assert not GroupedQueryAttention.steps_have_fixed_shape(model.config, "cuda")
    with torch.autocast("cpu", torch.bfloat16):
        assert unsupported_reason(model).startswith("autocast is enabled")
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    model.execution = Execution("batch-invariant")
    with caplog.at_level("INFO", "fiftyfold"):
        assert DecodeGraphs.if_supported(model, 4) is None
        assert caplog.messages == ["decode steps are not recorded: the batch-invariant mode computes token by token"]
        assert DecodeGraphs.if_supported(model, 4, cuda_graphs=False) is None and len(caplog.messages) == 1


def test_networks_elsewhere_have_no_recorded_steps(monkeypatch):
    model = build(layers=["csa", "hca"])
    assert unsupported_reason(Transformer.on_meta(model.config)) == "the network is on meta"
    monkeypatch.setattr("model.decode_graphs.native.level", lambda: None)
    assert unsupported_reason(model) == "native CPU operators are not available"
