"""Memory of a step of a long sequence: bounded by the chunk and by one row of scores per query."""

import re
from pathlib import Path

import pytest
import torch

from kernels import native
from model.cache import Cache
from model.cache.random_fill import fill_random
from model.forward.execution import Execution
from tests.model.memory import AllocationRecorder
from tests.model.networks import build


@pytest.fixture(autouse=True)
def without_native_operators(monkeypatch):
    """Disable native operators, since PyTorch does not see their memory. The last test measures the process instead."""
    monkeypatch.setattr(native, "level", lambda: None)


LONG, LONGER = (1 << 18) - 512, (1 << 20) - 512
MODELS = {mixer: build(layers=(mixer,), max_positions=1 << 20) for mixer in ("sliding", "csa", "hca", "mla", "dsa")}
PARTS = {"csa": "entries", "dsa": "latents"}
"""Part of the cache that holds what an indexer selects from."""


def step(mixer, history, tokens, mode="auto"):
    """Return the memory of appending some tokens to a long history."""
    model = MODELS[mixer]
    cache = Cache(model.config, 1, history + tokens)
    fill_random(cache, history)
    part = PARTS.get(mixer)
    model.execution = Execution(mode)
    try:
        with torch.inference_mode(), AllocationRecorder(part and cache.pool.rows(0, part)) as made:
            model(torch.zeros(1, tokens, dtype=torch.int64), cache)
    finally:
        model.execution = Execution()
    return made


@pytest.mark.parametrize("mixer", MODELS)
def test_prefill_memory_does_not_grow_with_tokens_times_history(mixer):
    small = max(step(mixer, LONG, 64).all)
    # Memory of the new tokens is small here, and the history is processed in runs.
    assert max(step(mixer, LONG, 256).all) < max(1.05 * small, 2**18)
    assert max(step(mixer, LONGER, 64).all) < 1.05 * small
    assert small < 2**24 * 1.05


@pytest.mark.parametrize("mixer", MODELS)
def test_batch_invariant_prefill_memory_does_not_grow_with_tokens(mixer):
    small = max(step(mixer, 1 << 15, 16, "batch-invariant").all)
    assert max(step(mixer, 1 << 15, 64, "batch-invariant").all) < max(1.05 * small, 2**17)


@pytest.mark.parametrize("mode", ["auto", "batch-invariant"])
@pytest.mark.parametrize("mixer", PARTS)
def test_decoding_reads_only_the_chosen_entries(mixer, mode):
    config = MODELS[mixer].config
    entry = {"csa": 8 + 2 * 8 + 2, "dsa": 24 + 2 * 4 + 2}[mixer]  # FP8, BF16 and the scale, padded
    queries = 16 if mode == "batch-invariant" else 1
    for history in (1 << 14, LONGER):
        made = step(mixer, history, 1, mode)
        assert made.from_source and max(made.from_source) == queries * config.index_topk * entry
    one_row_of_scores = 4 * (LONGER // config.indexer_ratios[0])
    assert max(made.all) < 1.05 * one_row_of_scores


def test_native_operators_use_constant_memory(monkeypatch):
    """Measure peak resident memory. Scores of full runs of queries would take 256 MiB."""
    monkeypatch.undo()
    status = Path("/proc/self/status")
    if native.level() is None or not status.exists():
        pytest.skip("no native operators, or no Linux")
    model = MODELS["csa"]
    cache = Cache(model.config, 1, LONGER + 512)
    fill_random(cache, LONGER)
    ids = torch.zeros(1, 256, dtype=torch.int64)

    def resident(field):
        return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1])

    with torch.inference_mode():
        model(ids[:, :8], cache)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        model(ids, cache)
    assert resident("VmHWM") - before < 64 << 20
