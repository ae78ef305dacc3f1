"""Selection from packed keys: the readable scores' own choice, whatever the sizes, formats and pages."""

import numpy as np
import pytest
import torch

from kernels import native
from kernels.cache_io import EntryLayout, Pages, pack, unpack
from kernels.formats import E2M1_VALUES
from kernels.index_topk import index_scores, index_topk, select_topk
from kernels.index_topk.reference import best_places
from kernels.index_topk.streamed import tile_scores
from kernels.quantize import round_to_format

FORMATS = ("fp4", "fp8", "bf16", "fp32")
HEADS, DIMS = 4, 32
MODES = {"streamed": {"backend": "streamed"}, "one by one": {"backend": "streamed", "batch_invariant": True}}
if native.level() is not None:
    MODES["native"] = {"backend": "cpu"}


def paged(packed, per_page, scattered):
    """The rows in pages among others that nobody may read."""
    count = -(-len(packed) // per_page)
    pages = (torch.randperm(count + 5) if scattered else torch.arange(2, count + 5))[:count].tolist()
    storage = torch.full((count + 5, per_page, packed.shape[1]), 0xFF, dtype=torch.uint8)
    for i, page in enumerate(pages):
        rows = packed[i * per_page :][:per_page]
        storage[page, : len(rows)] = rows
    return Pages(storage.flatten(0, 1), per_page, torch.tensor([pages], dtype=torch.int64))


def choose(query, rows, layout, weights, visible, k, **options):
    """Of one sequence: int64 [queries, k]."""
    return index_topk(query[None], rows, layout, weights[None], torch.tensor([visible]), k, **options)[0]


def whole_numbers(queries, entries, body_format):
    """Query, packed keys and head weights whose scores are exact in any order of summation, with many equal ones."""
    layout = EntryLayout(DIMS, body_format)
    query = torch.randint(-2, 3, (queries, HEADS, DIMS)).float()
    keys = torch.tensor(E2M1_VALUES)[torch.randint(0, 8, (entries, DIMS))]
    keys = keys * torch.randint(-1, 2, (entries, DIMS)) * (torch.rand(entries, 1) < 0.7)  # a third is nothing but zeros
    weights = torch.randint(-4, 5, (queries, HEADS)) / 4
    return query, pack(keys, layout), layout, weights


def expected_choice(query, packed, layout, weights, visible, k):
    scores = index_scores(query.unsqueeze(0), unpack(packed, layout).unsqueeze(0), weights.unsqueeze(0))
    permitted = torch.arange(len(packed)) < torch.tensor(visible).unsqueeze(-1)
    return select_topk(scores, permitted.unsqueeze(0), k)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entries", [1, 5, 192, 193, 1023, 1024, 1025, 2049, 5000, 16383, 16384, 16385, 33_000])
def test_the_choice_is_that_of_the_readable_scores(entries, mode):
    for scattered, queries in ((False, 1), (True, 1), (True, 70)):
        if mode == "one by one" and queries * entries > 200_000:
            queries = 3
        query, packed, layout, weights = whole_numbers(queries, entries, "fp4")
        rows = paged(packed, 18, scattered)
        for visible in ([entries] * queries, [0, *torch.randint(0, entries + 1, (queries - 1,)).tolist()]):
            for k in (3, 40):
                found = choose(query, rows, layout, weights, visible, k, **MODES[mode])
                assert found.shape == (queries, k) and found.dtype == torch.int64
                assert torch.equal(found, expected_choice(query, packed, layout, weights, visible, k)), (k, visible)


@pytest.mark.parametrize("mode", MODES)
def test_bf16_scores_tie_where_they_round_alike_and_the_lower_entry_wins(mode):
    query, packed, layout, weights = whole_numbers(5, 3000, "fp4")
    weights = weights + torch.rand_like(weights) / 1000
    rows, visible = paged(packed, 18, scattered=True), [3000] * 5
    keys = unpack(packed, layout).unsqueeze(0)
    rounded = index_scores(query.unsqueeze(0), keys, weights.unsqueeze(0)).bfloat16()
    expected = select_topk(rounded, torch.ones(1, 1, 3000, dtype=torch.bool), 40)[0]
    found = choose(query, rows, layout, weights, visible, 40, dtype=torch.bfloat16, **MODES[mode])
    assert torch.equal(found, expected)
    assert not torch.equal(found, choose(query, rows, layout, weights, visible, 40, **MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("body_format", FORMATS)
def test_every_format_in_every_run_of_queries(body_format, mode, monkeypatch):
    monkeypatch.setattr("kernels.index_topk.streamed._SCORES", 1 << 14)  # 8 queries at a time
    query, packed, layout, weights = whole_numbers(21, 2000, body_format)
    rows = paged(packed, 64, scattered=True)
    visible = [(t + 1) * 95 for t in range(21)]
    found = choose(query, rows, layout, weights, visible, 7, **MODES[mode])
    assert torch.equal(found, expected_choice(query, packed, layout, weights, visible, 7))


def test_ties_at_zero_go_to_the_lower_entry():
    """No product is positive, so that every score is zero, of one sign or the other."""
    layout = EntryLayout(DIMS, "fp4")
    rows = paged(pack(torch.ones(3000, DIMS), layout), 18, scattered=True)
    weights = torch.tensor([[1.0, -1.0, 0.5, -0.5], [-1.0, -1.0, -1.0, -1.0]])
    for mode in MODES.values():
        found = choose(-torch.ones(2, HEADS, DIMS), rows, layout, weights, [3000, 2], 4, **mode)
        assert found.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]


def test_nothing_visible_is_nothing_chosen():
    query, packed, layout, weights = whole_numbers(3, 1, "fp4")
    for mode in MODES.values():
        none = choose(query, paged(packed, 18, False), layout, weights, [0, 0, 0], 2, **mode)
        assert none.tolist() == [[-1, -1]] * 3


@pytest.mark.parametrize("body_format", FORMATS)
def test_tiles_are_scored_to_float32s_precision(body_format):
    layout = EntryLayout(128, body_format)
    query = round_to_format(torch.randn(5, 64, 128), body_format)
    packed, weights = pack(torch.randn(300, 128), layout), torch.randn(5, 64)
    keys = unpack(packed, layout)
    products = torch.einsum("shc,tc->sht", query.double(), keys.double()).relu()
    expected = (products * weights.double().unsqueeze(-1)).sum(1)
    found = tile_scores(query, packed, weights, layout)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    readable = index_scores(query.unsqueeze(0), keys.unsqueeze(0), weights.unsqueeze(0))[0]
    torch.testing.assert_close(found, readable, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.skipif(native.level() is None, reason="no native operators on this machine")
@pytest.mark.parametrize("dims", [8, 16, 24, 32, 64, 96, 128])
@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("body_format", FORMATS)
def test_native_scores_choose_as_float64s(body_format, heads, dims):
    """Random values instead of whole numbers: sums of several blocks with scales of their own."""
    layout = EntryLayout(dims, body_format)
    for queries, entries in ((1, 700), (40, 300)):
        query = round_to_format(torch.randn(queries, heads, dims), body_format)
        packed = pack(torch.randn(entries, dims) * torch.exp2(torch.randint(-9, 9, (entries, 1)).float()), layout)
        weights = torch.randn(queries, heads)
        products = torch.einsum("shc,tc->sht", query.double(), unpack(packed, layout).double()).relu()
        scores = (products * weights.double().unsqueeze(-1)).sum(1)
        found = choose(query, paged(packed, 18, True), layout, weights, [entries] * queries, 9, backend="cpu")
        best = scores.topk(9, dim=-1).values
        torch.testing.assert_close(scores.gather(-1, found), best, rtol=1e-5, atol=1e-6 * float(scores.abs().max()))


@pytest.mark.parametrize("k", [1, 3, 16, 100])
@pytest.mark.parametrize("entries", [0, 1, 15, 16, 17, 64, 65, 193, 1025, 6401, 7001])
def test_best_places_are_those_of_a_sort(entries, k):
    levels = torch.tensor([-1.5, -0.0, 0.0, 0.0, 2.0, 3.25, float("-inf"), float("-inf")])
    for some in (levels, levels[:1], levels[1:3], levels[-2:]):
        scores = some[torch.randint(0, len(some), (2, 3, entries))]
        scores[0, 0, : entries // 2] = float("-inf")
        found = best_places(scores, k)
        assert found.shape == (2, 3, k)
        for row, places in zip(scores.flatten(0, 1), found.flatten(0, 1)):
            order = np.lexsort((np.arange(entries), -row.numpy()))
            order = [int(place) for place in order if row[place] > float("-inf")][:k]
            assert places.tolist() == order + [-1] * (k - len(order))
