"""Selection from packed keys: the readable scores' own choice, whatever the sizes, formats and pages."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch

from kernels.cache_io import EntryLayout, PagedRows, pack, unpack
from kernels.formats import E2M1_VALUES
from kernels.index_topk import index_scores, index_topk, select_topk, streamed, tile_scores
from kernels.index_topk.reference import best_places
from kernels.index_topk.streamed import exact_in_bf16
from kernels.quantize import round_to_format

FORMATS = ("fp4", "fp8", "bf16", "fp32")
HEADS, DIMS = 4, 32
MODES = {
    "free shapes": {},
    "fixed shapes": {"fixed_shapes": True},
    "one by one": {"fixed_shapes": True, "one_by_one": True},
}


def paged(packed, per_page, scattered):
    """The rows in pages among others that nobody may read."""
    count = -(-len(packed) // per_page)
    pages = (torch.randperm(count + 5) if scattered else torch.arange(2, count + 5))[:count].tolist()
    storage = torch.full((count + 5, per_page, packed.shape[1]), 0xFF, dtype=torch.uint8)
    for i, page in enumerate(pages):
        rows = packed[i * per_page :][:per_page]
        storage[page, : len(rows)] = rows
    return PagedRows(storage.flatten(0, 1), per_page, pages, not scattered)


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
                found = index_topk(query, rows, layout, weights, visible, k, **MODES[mode])
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
    found = index_topk(query, rows, layout, weights, visible, 40, dtype=torch.bfloat16, **MODES[mode])
    assert torch.equal(found, expected)
    assert not torch.equal(found, index_topk(query, rows, layout, weights, visible, 40, **MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("body_format", FORMATS)
def test_every_format_in_every_run_of_queries(body_format, mode, monkeypatch):
    monkeypatch.setattr("kernels.index_topk.streamed._SCORES", 1 << 14)  # 8 queries at a time
    query, packed, layout, weights = whole_numbers(21, 2000, body_format)
    rows = paged(packed, 64, scattered=True)
    visible = [(t + 1) * 95 for t in range(21)]
    found = index_topk(query, rows, layout, weights, visible, 7, **MODES[mode])
    assert torch.equal(found, expected_choice(query, packed, layout, weights, visible, 7))


def test_ties_at_zero_go_to_the_lower_entry():
    """No product is positive, so that every score is zero, of one sign or the other."""
    layout = EntryLayout(DIMS, "fp4")
    rows = paged(pack(torch.ones(3000, DIMS), layout), 18, scattered=True)
    weights = torch.tensor([[1.0, -1.0, 0.5, -0.5], [-1.0, -1.0, -1.0, -1.0]])
    for mode in MODES.values():
        found = index_topk(-torch.ones(2, HEADS, DIMS), rows, layout, weights, [3000, 2], 4, **mode)
        assert found.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]


def test_nothing_visible_is_nothing_chosen():
    query, packed, layout, weights = whole_numbers(3, 1, "fp4")
    for mode in MODES.values():
        none = index_topk(query, paged(packed[:0], 18, False), layout, weights, [0, 0, 0], 2, **mode)
        assert none.tolist() == [[-1, -1]] * 3


@pytest.mark.parametrize("mode", ["fixed shapes", "one by one"])
def test_fixed_shapes_are_few(mode):
    """Compiled code is made for each shape, and one shape only gives a score the same bits in any company."""
    seen = set()

    def spy(query, packed, weights, layout):
        seen.add((len(query), len(packed)))
        return tile_scores(query, packed, weights, layout)

    for queries, entries in itertools.product((1, 2, 63, 65), (1, 1000, 1025, 5000, 9000)):
        query, packed, layout, weights = whole_numbers(queries, entries, "fp4")
        rows = paged(packed, 18, scattered=False)
        index_topk(query, rows, layout, weights, [entries] * queries, 3, **MODES[mode], score=spy)
    assert all(n & (n - 1) == 0 for shape in seen for n in shape), seen
    assert mode != "one by one" or len(seen) == 1, seen


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("body_format", FORMATS)
def test_tiles_are_scored_to_float32s_precision(body_format, amx, monkeypatch):
    """In BF16 units, too, where the machine has them: they lose nothing of what is stored."""
    monkeypatch.setattr(streamed, "has_amx", lambda: amx)
    layout = EntryLayout(128, body_format)
    query = round_to_format(torch.randn(5, 64, 128), body_format)
    packed, weights = pack(torch.randn(300, 128), layout), torch.randn(5, 64)
    keys = unpack(packed, layout)
    products = torch.einsum("shc,tc->sht", query.double(), keys.double()).relu()
    expected = (products * weights.double().unsqueeze(-1)).sum(1)
    tiles = []

    def spy(*arguments):
        tiles.append(tile_scores(*arguments))
        return tiles[-1]

    before = torch.backends.mkldnn.matmul.fp32_precision
    index_topk(query, paged(packed, 300, scattered=False), layout, weights, [300] * 5, 3, score=spy)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    (found,) = tiles
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    readable = index_scores(query.unsqueeze(0), keys.unsqueeze(0), weights.unsqueeze(0))[0]
    torch.testing.assert_close(found, readable, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_two_threads_leave_the_processs_setting_as_they_found_it():
    """The second begins while the first scores, and ends after it."""
    matmul, layout = torch.backends.mkldnn.matmul, EntryLayout(64, "fp8")
    before, begun, go_on = matmul.fp32_precision, Event(), Event()

    def second():
        with exact_in_bf16(layout):
            begun.set()
            assert go_on.wait(60)
            assert matmul.fp32_precision == "bf16"

    with ThreadPoolExecutor(1) as pool:
        with exact_in_bf16(layout):
            running = pool.submit(second)
            assert begun.wait(60)
        go_on.set()
        running.result()
    assert matmul.fp32_precision == before


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
