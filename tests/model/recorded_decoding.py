"""Run by test_decode_graphs.py with TRITON_INTERPRET=1: recorded decode steps equal others, bit for bit.

The operators are those of a GPU, with kernels in Triton's interpreter.
"""

import importlib

import pytest
import torch

from kernels import native
from kernels.paged_attention import triton as paged
from model.cache import Cache
from model.cache.pages import PagePool
from model.decode_graphs import DecodeGraphs
from model.generation import prefill
from model.mixers.compressor import Compressor
from tests.model.networks import build, random_ids
from tests.model.replayed_steps import BAKES, bake_positions, decode, make_lengths_a_tensor, read_lengths
from tests.model.step_recorder import StepRecorder

OPERATIONS = ("cache_io", "compress", "expert_dispatch", "hyper_connections", "index_topk", "paged_attention")
V4 = {"layers": ["csa", "hca"], "num_experts": 3, "experts_per_token": 1, "num_hash_layers": 1}
V32 = {"layers": ["dsa", "mla"], "index_format": "fp8_128", "kv_format": "fp8_128"}


@pytest.fixture(autouse=True)
def operators_of_a_gpu(monkeypatch):
    for name in OPERATIONS:
        monkeypatch.setattr(importlib.import_module(f"kernels.{name}"), "can_run", lambda x: True)
    monkeypatch.setattr(native, "level", lambda: None)
    # The splits of the keys depend on the width of the page table, and the order of sums on the splits.
    monkeypatch.setattr(paged, "multiprocessors", lambda device: 0)


def network(**change):
    model = build(**change)
    model.cast_weights(torch.bfloat16)
    return model


def caches_of(model, lengths, pool=None):
    """Return two equal caches of sequences of these lengths, which share no page that either writes to."""
    pool = pool or PagePool(model.config, 24)
    caches = []
    with pytest.MonkeyPatch.context() as patch:  # kernels of long prompts are slow in the interpreter
        for name in OPERATIONS:
            patch.setattr(importlib.import_module(f"kernels.{name}"), "can_run", lambda x: False)
        for i, length in enumerate(lengths):
            caches.append(Cache(model.config, 1, 400, pool=pool))
            prefill(model, caches[-1], random_ids(1, length, seed=i))
    cache = Cache.join(caches)
    return cache, cache.fork()


def recording(model, max_batch, pool):
    """Return the recorded steps of a model, and their recorder."""

    def state():
        return [*graphs._fixed_state, *pool._rows.values()]

    def resident():
        frequencies = [x.frequencies for x in (*model._frequencies.values(), *compressors(model))]
        kept = [w for layer in model.moe_layers() for _, stacks in layer._rounded.values() for w in stacks]
        matrices = importlib.import_module("kernels.hadamard.reference")._MATRICES.values()
        steps = [x for step in graphs._steps.values() for x in (step.ids, step.starts, step.page_ids)]
        return [*state(), *model.parameters(), *model.buffers(), *frequencies, *kept, *matrices, *steps]

    recorder = StepRecorder(resident, state)
    graphs = DecodeGraphs(model, max_batch, recorder)
    return graphs, recorder


def compressors(model):
    return [module.frequencies for module in model.modules() if isinstance(module, Compressor)]


def test_replayed_steps_equal_others():
    """Over two periods of the compression ratios and a page border, for sequences of different lengths."""
    model = network(**V4, hyper_connections=False)
    size, period = model.config.page_tokens, model.config.hca_ratio
    assert period % model.config.csa_ratio == 0
    cache, expected = caches_of(model, [size - 3, 5])
    graphs, recorder = recording(model, 3, cache.pool)
    decode(model, graphs, cache, expected, 2 * period + 2)
    assert len(graphs) == recorder.recorded == 2 and graphs.records  # tables of one page and of two
    assert cache.lengths[0] > size


@pytest.mark.parametrize("change", [{**V4, "layers": ["sliding", "csa"]}, V32], ids=["hyper-connections", "latent"])
def test_other_layers(change):
    model = network(**change)
    cache, expected = caches_of(model, [9, 30])
    graphs, recorder = recording(model, 2, cache.pool)
    decode(model, graphs, cache, expected, 6)
    assert len(graphs) == recorder.recorded == 1


def test_sequences_leave_and_join():
    """Batches of other sizes have other recordings, and the fixed state of each is where its recording expects it."""
    model = network(**V4, hyper_connections=False)
    cache, expected = caches_of(model, [9, 30, 17])
    graphs, recorder = recording(model, 3, cache.pool)
    decode(model, graphs, cache, expected, 3)
    cache, expected = cache.take([2, 0]), expected.take([2, 0])
    decode(model, graphs, cache, expected, 5)
    one, other = caches_of(model, [22], cache.pool)
    decode(model, graphs, one, other, 3)  # the first cache moves out
    decode(model, graphs, cache, expected, 2)  # and in again
    assert len(graphs) == recorder.recorded == 3


@pytest.mark.parametrize("bake", BAKES)
def test_a_number_of_python_in_a_recorded_step_is_noticed(bake, monkeypatch):
    model = network(**V4, hyper_connections=False)
    cache, expected = caches_of(model, [20, 20] if bake is bake_positions else [20, 5])
    graphs, _ = recording(model, 2, cache.pool)
    bake(monkeypatch)
    with pytest.raises(AssertionError):
        decode(model, graphs, cache, expected, 3)
        decode(model, graphs, expected, cache, 4)  # which have other pages
    assert graphs.records and len(graphs)


@pytest.mark.parametrize(
    ("break_step", "reason"),
    [
        (make_lengths_a_tensor, "reads a tensor"),
        (read_lengths, "synchronizes with the CPU while a step is recorded"),
    ],
)
def test_a_step_that_cannot_be_recorded_runs_normally(break_step, reason, monkeypatch, caplog):
    model = network(**V4, hyper_connections=False)
    cache, expected = caches_of(model, [20, 5])
    graphs, _ = recording(model, 2, cache.pool)
    break_step(monkeypatch)
    decode(model, graphs, cache, expected, 4)
    assert not graphs.records and not len(graphs)
    (message,) = (record.getMessage() for record in caplog.records if "not recorded" in record.getMessage())
    assert message.startswith("decode steps are not recorded: recording a step failed (") and reason in message


SYNCHRONIZING = {
    "allclose": lambda x: torch.allclose(x, x),
    "bincount": lambda x: x.bincount(),
    "equal": lambda x: torch.equal(x, x),
    "index": lambda x: x[x >= 0],
    "index by bytes": lambda x: x[(x >= 0).byte()],
    "index_put": lambda x: torch.index_put(x, (x >= 0,), x),
    "index_put_": lambda x: x.clone().index_put_((x >= 0,), x),
    "item": lambda x: x.sum().item(),
    "masked_select": lambda x: x.masked_select(x >= 0),
    "nonzero": lambda x: x.nonzero(),
    "repeat_interleave": lambda x: x.repeat_interleave(x),
    "tolist": lambda x: x.tolist(),
    "truth": lambda x: bool(x.all()),
    "unique": lambda x: x.unique(),
    "unique rows": lambda x: x.unsqueeze(1).unique(dim=0),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "unsorted unique": lambda x: torch._unique(x),
}


@pytest.mark.parametrize("operator", SYNCHRONIZING)
def test_operators_that_synchronize_are_not_recorded(operator):
    x = torch.tensor([2, 1, 3])
    recorder = StepRecorder(lambda: [x], lambda: [])
    recorder(lambda: x[x - 1].repeat_interleave(2).repeat_interleave(x.new_full((6,), 1), output_size=6) / 2)
    with pytest.raises(RuntimeError, match="synchronizes with the CPU while a step is recorded"):
        recorder(lambda: (SYNCHRONIZING[operator](x), x / 2)[1])
