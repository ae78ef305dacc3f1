"""Recorded decode steps. The recordings themselves are tested in a process of their own, ``recorded_decoding.py``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.cache import Cache
from model.cache.pages import PagePool
from model.decode_graphs import DecodeGraphs, decode_graphs, fault
from model.errors import CacheError
from model.forward.execution import Execution
from model.generation import generate, prefill
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


@pytest.mark.parametrize("layers", [["csa", "hca", "sliding"], ["mla", "dsa"]])
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


def test_networks_without_recorded_steps_are_named(monkeypatch, caplog):
    model = build(layers=["csa", "hca"])
    assert decode_graphs(model, 4) is None and not caplog.records
    assert fault(model) == "the network is on cpu"
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    assert fault(model).startswith("the Triton kernels do not support this GPU")
    monkeypatch.setattr("model.decode_graphs.can_run", lambda x: True)
    assert fault(model).startswith("with float32 weights, attention and experts")
    baseline = build(layers=["csa", "gqa"])
    for network in (model, baseline):
        network.cast_weights(torch.bfloat16)
    assert fault(model) == ""
    assert fault(baseline) == "steps of 'gqa' layers depend on the lengths of the sequences"
    model.execution = Execution("batch-invariant")
    with caplog.at_level("INFO", "fiftyfold"):
        assert decode_graphs(model, 4) is None
    assert caplog.messages == ["decoding without CUDA graphs: the batch-invariant mode computes token by token"]


def test_generation_uses_them_unless_told_otherwise(monkeypatch):
    model, used = build(layers=["csa", "hca"]), []

    def find(model, batch):
        used.append(DecodeGraphs(model, batch, rerun))
        return used[-1]

    monkeypatch.setattr("model.generation.decode_graphs", find)
    prompt = random_ids(2, 9)
    expected = generate(model, prompt, 12, cuda_graphs=False)
    assert not used and torch.equal(generate(model, prompt, 12), expected)
    assert len(used) == len(used[0]) == 1
