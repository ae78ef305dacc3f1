"""Comparison of recorded decode steps with others, and faults that a comparison must notice."""

import torch

from kernels.cache_io import write_ring
from model.cache.pages import PageTable
from model.cache.ring import Ring
from tests.model.networks import random_ids


def check_equal(cache, expected):
    """Every byte in use is equal: the entries of all sequences, and the whole fixed state."""
    assert cache.lengths == expected.lengths
    for layer, other in zip(cache.all_layers, expected.all_layers):
        for name, part in layer.parts.items():
            if part not in layer.fixed():
                for i, count in enumerate(part.counts):
                    rows = torch.tensor([i]), torch.arange(count).unsqueeze(0)
                    found, wanted = (one.pages.gather_from(*rows) for one in (part, other.parts[name]))
                    assert torch.equal(found, wanted), (name, i)
    for found, wanted in zip(cache._fixed_tensors(), expected._fixed_tensors(), strict=True):
        assert torch.equal(found, wanted)


@torch.inference_mode()
def decode(model, graphs, cache, expected, steps, seed=5):
    ids = random_ids(cache.batch_size, steps, seed=seed)
    for step in range(steps):
        wanted = model(ids[:, step : step + 1], expected)
        found = graphs.logits(ids[:, step : step + 1], cache)
        assert torch.equal(found, wanted), step
        check_equal(cache, expected)


def bake_positions(monkeypatch):
    def append(ring, rows):
        write_ring(ring.data, rows, torch.full((len(rows),), ring.table.lengths[0]))

    monkeypatch.setattr(Ring, "append", append)


def bake_completion(monkeypatch):
    def may_complete(table, ratio):
        return any(first < last for first, last in zip(*table.entry_counts(ratio)))

    monkeypatch.setattr(PageTable, "may_complete", may_complete)


def bake_pages(monkeypatch):
    def page_ids(table):
        pages = [torch.full((), page) for (page,) in table.pages]
        return torch.stack(pages).view(-1, 1)

    monkeypatch.setattr(PageTable, "page_ids", property(page_ids))


BAKES = (bake_positions, bake_completion, bake_pages)
"""Replace a tensor of a step by a number of Python, which a recording would repeat."""


def make_lengths_a_tensor(monkeypatch):
    """Make a tensor from a Python list in a step, which cannot be recorded."""
    monkeypatch.setattr(PageTable, "starts", property(lambda table: torch.tensor(table.lengths)))


def read_lengths(monkeypatch):
    """Return a value to Python in a step, which cannot be recorded."""
    monkeypatch.setattr(PageTable, "may_complete", lambda table, ratio: bool((table.starts >= 0).all()))
