"""Eager PyTorch computes equal results on GPU and CPU."""

import pytest
import torch

import model.mixers.indexer as indexer
from model.cache import Cache
from model.cache.file import restore_cache, save_cache
from model.decode_graphs import DecodeGraphs, unsupported_reason
from model.generation import generate, prefill
from tests.model.networks import BF16, EXACT, build, random_ids

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PIECES = [23, 1, 1, 16, 1, 28]


def read(network, cache, ids, monkeypatch):
    """Return logits and top-k selections on the CPU."""
    chosen, original = [], indexer.index_topk

    def watch(*arguments, **options):
        chosen.append(original(*arguments, **options))
        return chosen[-1]

    monkeypatch.setattr(indexer, "index_topk", watch)
    with torch.inference_mode():
        logits = torch.cat([network(piece, cache) for piece in ids.to(cache.device).split(PIECES, dim=1)], dim=1)
    monkeypatch.setattr(indexer, "index_topk", original)
    return logits.cpu(), torch.cat(chosen).cpu()


@pytest.mark.parametrize("change", [EXACT, {}, BF16, {"index_heads": 1}], ids=["fp32", "released", "bf16", "ties"])
def test_a_gpu_computes_the_same(change, monkeypatch, tmp_path):
    network = build(**change)
    ids = torch.randint(network.config.vocab_size, (1, sum(PIECES)))
    there = Cache(network.config, 1, 200)
    expected, numbers = read(network, there, ids, monkeypatch)
    here = Cache(network.config, 1, 200, "cuda")
    found, chosen = read(network.to("cuda"), here, ids, monkeypatch)
    # Values halfway between two codes may round either way.
    tolerance = 1e-5 if change is EXACT else 1e-2
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    if change is EXACT:
        assert torch.equal(chosen, numbers)
    save_cache(there, tmp_path / "cache.safetensors")
    moved = Cache(network.config, 1, 200, "cuda")
    restore_cache(moved, tmp_path / "cache.safetensors")
    assert moved.nbytes() == there.nbytes() and moved.lengths == there.lengths
    with torch.inference_mode():
        after = network(ids[:, :1].to("cuda"), moved).cpu()
        network.to("cpu")
        assert (after - network(ids[:, :1], there)).abs().max() <= tolerance * after.abs().max()


@pytest.mark.parametrize("layers", [["csa", "hca", "sliding"], ["dsa", "mla"]])
def test_replayed_cuda_graphs_are_close_to_other_steps(layers):
    """The splits of the keys depend on the width of the page table, and the order of sums on the splits."""
    network = build(layers=layers).to("cuda")
    network.cast_weights(torch.bfloat16)
    assert unsupported_reason(network) == ""
    prompt = random_ids(2, 61).cuda()
    assert generate(network, prompt, 60, cuda_graphs=True).shape == (2, 121)
    with torch.inference_mode():
        cache = Cache(network.config, 2, 200, "cuda")
        prefill(network, cache, prompt)
        expected, graphs = cache.fork(), DecodeGraphs(network, 2)
        for ids in random_ids(2, 30).cuda().split(1, dim=1):
            torch.testing.assert_close(graphs.logits(ids, cache), network(ids, expected), rtol=1e-2, atol=1e-2)
    assert len(graphs) and graphs.records
