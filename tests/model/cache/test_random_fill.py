"""Randomly filled caches: valid rows, lengths, and decoding from there."""

import pytest
import torch

from kernels.cache_io import unpack
from model.cache import Cache
from model.cache.file import restore_cache, save_cache
from model.cache.pages import PagePool
from model.cache.random_fill import fill_random
from model.cache.ring import Ring
from model.config import ModelConfig
from model.errors import CacheError
from tests.model.networks import SMALL, build, stored_rows

LAYERS = ("sliding", "csa", "hca", "gqa", "mla", "dsa")


@pytest.mark.parametrize("formats", [{}, {"kv_format": "fp4", "index_format": "fp8", "gqa_format": "fp8"}])
@pytest.mark.parametrize("tokens", [1, 11, 72, 200])
def test_rows_hold_packed_normal_vectors(tokens, formats):
    config = ModelConfig(**{**SMALL, "layers": LAYERS, **formats})
    cache = Cache(config, 3, 300)
    fill_random(cache, tokens)
    assert cache.lengths == [tokens] * 3 == cache.high_water_marks
    for layer in cache.layers:
        for part in layer.parts.values():
            if isinstance(part, Ring):
                values = unpack(part.data, part.part.layout) if part.data.dtype == torch.uint8 else part.data
            else:
                values = unpack(stored_rows(part), part.layout)
                assert values.shape[1] == tokens // part.ratio
            assert values.isfinite().all() and values.shape[0] == 3
            assert (values.abs().amax(-1) > 0).all()
            if values.numel() > 1000:
                assert 0.8 < values.std() < 1.2 and abs(values.mean()) < 0.1


def test_rows_do_not_repeat_where_memory_allows():
    config = ModelConfig(**{**SMALL, "layers": ("csa", "csa"), "index_head_dim": 64, "max_positions": 1 << 16})
    cache = Cache(config, 2, 1 << 14)
    fill_random(cache, 1 << 14)
    rows = [stored_rows(layer.index)[sequence] for layer in cache.layers for sequence in (0, 1)]
    for some in rows:
        assert len(some.unique(dim=0)) == len(some)
    assert not any(torch.equal(rows[0], other) for other in rows[1:])


def test_a_short_piece_is_repeated(monkeypatch):
    monkeypatch.setattr("model.cache.random_fill._PIECE_BYTES", 1000)  # less than a page of gqa rows
    config = ModelConfig(**{**SMALL, "layers": LAYERS})
    cache = Cache(config, 2, 400)
    fill_random(cache, 400)
    for (layer, name), part in cache.pool.parts.items():
        for rows in stored_rows(getattr(cache.layers[layer], name)):
            assert len(rows.unique(dim=0)) == min(len(rows), 1000 // part.layout.nbytes), (layer, name)


def test_the_seed_decides_the_rows_and_decoding_continues(tmp_path):
    model = build(layers=LAYERS)
    ids = torch.randint(0, 50, (1, 5))

    def decoded(seed, restored=False):
        cache = Cache(model.config, 1, 300)
        fill_random(cache, 200, seed)
        if restored:
            save_cache(cache, tmp_path / "cache.safetensors")
            restore_cache(cache := Cache(model.config, 1, 300), tmp_path / "cache.safetensors")
        with torch.inference_mode():
            steps = [model(ids[:, t : t + 1], cache) for t in range(5)]
        assert cache.length == 205
        return torch.cat(steps, dim=1)

    assert decoded(1).isfinite().all()
    assert torch.equal(decoded(1), decoded(1)) and not torch.equal(decoded(1), decoded(2))
    assert torch.equal(decoded(1), decoded(1, restored=True))


def test_a_refused_fill_changes_nothing():
    config = ModelConfig(**SMALL)
    cache = Cache(config, 1, 100)
    with pytest.raises(CacheError, match="101 more tokens do not fit: the cache holds 0 of at most 100"):
        fill_random(cache, 101)
    with pytest.raises(CacheError, match=r"at least 1 token: the cache holds \[0\], asked for 0"):
        fill_random(cache, 0)
    pool = PagePool(config, 1)
    with pytest.raises(CacheError, match="the page pool is exhausted"):
        fill_random(Cache(config, 1, 300, pool=pool), 80)
    assert pool.free_pages == 1 and cache.lengths == [0]
    fill_random(cache, 100)
    with pytest.raises(CacheError, match=r"only an empty cache can be filled.* the cache holds \[100\]"):
        fill_random(cache, 1)
