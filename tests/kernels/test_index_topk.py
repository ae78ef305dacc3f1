import numpy as np
import pytest
import torch
from backend_testing import E2M1_VALUES, available, needs_native

from kernels.cache_io import EntryLayout, Pages, pack, unpack
from kernels.cache_io.layout import FORMAT_BITS
from kernels.hadamard import hadamard
from kernels.index_scores import index_scores
from kernels.index_topk import BACKENDS, index_topk, select_topk
from kernels.index_topk.eager import score_tile
from kernels.index_topk.selection import topk_indices
from kernels.quantize import round_to_format

FORMATS = list(FORMAT_BITS)
HEADS, DIMS = 4, 32
MODES = {backend: {"backend": backend} for backend in available(BACKENDS)}
MODES["batch-invariant"] = {"backend": "eager", "batch_invariant": True}


def paged(packed, page_size, scattered):
    """Store the rows in pages among others that must not be read."""
    count = -(-len(packed) // page_size)
    pages = (torch.randperm(count + 5) if scattered else torch.arange(2, count + 5))[:count].tolist()
    storage = torch.full((count + 5, page_size, packed.shape[1]), 0xFF, dtype=torch.uint8)
    for i, page in enumerate(pages):
        rows = packed[i * page_size :][:page_size]
        storage[page, : len(rows)] = rows
    return Pages(storage.flatten(0, 1), page_size, torch.tensor([pages], dtype=torch.int64))


def choose(query, rows, layout, weights, visible, k, **options):
    """Return the selection for one sequence: int64 [queries, k]."""
    return index_topk(query[None], rows, layout, weights[None], torch.tensor([visible]), k, **options)[0]


def integer_scores(queries, entries, body_format):
    """Return query, packed keys, layout and head weights whose scores are exact in any order of summation.

    Many of them are equal.
    """
    layout = EntryLayout(DIMS, body_format)
    query = torch.randint(-2, 3, (queries, HEADS, DIMS)).float()
    keys = torch.tensor(E2M1_VALUES)[torch.randint(0, 8, (entries, DIMS))]
    keys = keys * torch.randint(-1, 2, (entries, DIMS)) * (torch.rand(entries, 1) < 0.7)  # a third are all zeros
    weights = torch.randint(-4, 5, (queries, HEADS)) / 4
    return query, pack(keys, layout), layout, weights


def expected_choice(query, packed, layout, weights, visible, k):
    scores = index_scores(query.unsqueeze(0), unpack(packed, layout).unsqueeze(0), weights.unsqueeze(0))
    permitted = torch.arange(len(packed)) < torch.tensor(visible).unsqueeze(-1)
    return select_topk(scores, permitted.unsqueeze(0), k)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entries", [1, 5, 192, 193, 1023, 1024, 1025, 2049, 5000, 16383, 16384, 16385, 33_000])
def test_the_selection_follows_the_reference_scores(entries, mode):
    for scattered, queries in ((False, 1), (True, 1), (True, 70)):
        if mode == "batch-invariant" and queries * entries > 200_000:
            queries = 3
        query, packed, layout, weights = integer_scores(queries, entries, "fp4")
        rows = paged(packed, 18, scattered)
        for visible in ([entries] * queries, [0, *torch.randint(0, entries + 1, (queries - 1,)).tolist()]):
            for k in (3, 40):
                found = choose(query, rows, layout, weights, visible, k, **MODES[mode])
                assert found.shape == (queries, k) and found.dtype == torch.int64
                assert torch.equal(found, expected_choice(query, packed, layout, weights, visible, k)), (k, visible)


@pytest.mark.parametrize("mode", MODES)
def test_scores_that_are_equal_in_bf16_tie_and_the_lower_entry_wins(mode):
    query, packed, layout, weights = integer_scores(5, 3000, "fp4")
    weights = weights + torch.rand_like(weights) / 1000
    rows, visible = paged(packed, 18, scattered=True), [3000] * 5
    keys = unpack(packed, layout).unsqueeze(0)
    rounded = index_scores(query.unsqueeze(0), keys, weights.unsqueeze(0)).bfloat16()
    expected = select_topk(rounded, torch.ones(1, 5, 3000, dtype=torch.bool), 40)[0]
    found = choose(query, rows, layout, weights, visible, 40, dtype=torch.bfloat16, **MODES[mode])
    assert torch.equal(found, expected)
    assert not torch.equal(found, choose(query, rows, layout, weights, visible, 40, **MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("body_format", FORMATS)
def test_every_format_in_groups_of_queries(body_format, mode, monkeypatch):
    monkeypatch.setattr("kernels.index_topk.eager._MAX_SCORES", 1 << 14)  # 8 queries at a time
    query, packed, layout, weights = integer_scores(21, 2000, body_format)
    rows = paged(packed, 64, scattered=True)
    visible = [(t + 1) * 95 for t in range(21)]
    found = choose(query, rows, layout, weights, visible, 7, **MODES[mode])
    assert torch.equal(found, expected_choice(query, packed, layout, weights, visible, 7))


def test_ties_at_zero_go_to_the_lower_entry():
    """No product is positive, so that all scores are 0.0 or -0.0."""
    layout = EntryLayout(DIMS, "fp4")
    rows = paged(pack(torch.ones(3000, DIMS), layout), 18, scattered=True)
    weights = torch.tensor([[1.0, -1.0, 0.5, -0.5], [-1.0, -1.0, -1.0, -1.0]])
    for mode in MODES.values():
        found = choose(-torch.ones(2, HEADS, DIMS), rows, layout, weights, [3000, 2], 4, **mode)
        assert found.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]


def test_nothing_is_selected_without_visible_entries():
    query, packed, layout, weights = integer_scores(3, 1, "fp4")
    for mode in MODES.values():
        none = choose(query, paged(packed, 18, False), layout, weights, [0, 0, 0], 2, **mode)
        assert none.tolist() == [[-1, -1]] * 3


@pytest.mark.parametrize("body_format", FORMATS)
def test_tiles_are_scored_with_float32_precision(body_format):
    layout = EntryLayout(128, body_format)
    query = round_to_format(torch.randn(5, 64, 128), body_format)
    packed, weights = pack(torch.randn(300, 128), layout), torch.randn(5, 64)
    keys = unpack(packed, layout)
    products = torch.einsum("shc,tc->sht", query.double(), keys.double()).relu()
    expected = (products * weights.double().unsqueeze(-1)).sum(1)
    found = score_tile(query, packed, weights, layout)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    reference = index_scores(query.unsqueeze(0), keys.unsqueeze(0), weights.unsqueeze(0))[0]
    torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@needs_native
@pytest.mark.parametrize("dims", [8, 16, 24, 32, 64, 96, 128])
@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("body_format", FORMATS)
def test_cpu_selects_the_best_float64_scores(body_format, heads, dims):
    """Random values, in several blocks with different scales."""
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
def test_topk_indices_equal_those_of_a_stable_sort(entries, k):
    levels = torch.tensor([-1.5, -0.0, 0.0, 0.0, 2.0, 3.25, float("-inf"), float("-inf")])
    for some in (levels, levels[:1], levels[1:3], levels[-2:]):
        scores = some[torch.randint(0, len(some), (2, 3, entries))]
        scores[0, 0, : entries // 2] = float("-inf")
        found = topk_indices(scores, k)
        assert found.shape == (2, 3, k)
        for row, indices in zip(scores.flatten(0, 1), found.flatten(0, 1)):
            order = np.lexsort((np.arange(entries), -row.numpy()))
            order = [int(i) for i in order if row[i] > float("-inf")][:k]
            assert indices.tolist() == order + [-1] * (k - len(order))


@pytest.mark.parametrize("entries", [33, 40, 129, 700, 3000])
def test_the_best_of_distinct_scores_are_found_wherever_they_are(entries):
    scores = torch.rand(100, entries).argsort(-1).float()
    for k in (1, 2, 3, 20):
        assert torch.equal(topk_indices(scores, k), scores.topk(k).indices)


@needs_native
@pytest.mark.parametrize("entries", [1, 8, 100, 300, 2500])
def test_the_native_selection_is_the_one_in_pytorch(entries):
    scores = torch.randn(3, 20, entries).round(decimals=1)  # many ties
    for batch in (1, 3):
        permitted = torch.rand(batch, 20, entries) < 0.7
        permitted[0, 0] = False
        for k in (1, 5, 32):
            expected = topk_indices(scores.masked_fill(~permitted, float("-inf")), k)
            assert torch.equal(select_topk(scores, permitted, k), expected)
            assert torch.equal(select_topk(scores[:, 3:9], permitted[:, 3:9], k), expected[:, 3:9])


@needs_native
def test_the_native_selection_refuses_masks_of_other_shapes():
    with pytest.raises(ValueError, match=r"select_topk: scores .* and permitted .* do not match"):
        select_topk(torch.zeros(2, 3, 5), torch.ones(1, 3, 4, dtype=torch.bool), 2)


@pytest.mark.parametrize("is_native", [True, False])
def test_ties_go_to_the_lower_entry_and_only_permitted_ones_are_selected(is_native, monkeypatch):
    if not is_native:
        monkeypatch.setattr("kernels.native.level", lambda: None)
    scores = torch.tensor([[[0.0, -0.0, 5.0, 0.0, 0.0, 9.0], [-1.0, -2.0, -1.0, -3.0, 7.0, 7.0]]])

    def first(*counts):
        return torch.arange(6) < torch.tensor([counts]).unsqueeze(-1)

    assert select_topk(scores, first(5, 4), 3).tolist() == [[[2, 0, 1], [0, 2, 1]]]
    assert select_topk(scores, first(0, 2), 3).tolist() == [[[-1, -1, -1], [0, 1, -1]]]
    assert select_topk(scores, first(5, 4), 8)[0, 0].tolist()[-3:] == [-1, -1, -1]
    assert select_topk(scores, ~first(1, 4), 2).tolist() == [[[5, 2], [4, 5]]]


def test_hadamard_rotation_of_queries_and_keys_does_not_change_the_selection():
    q, k, w = (torch.randn(s, dtype=torch.float64) for s in ((2, 9, 4, 32), (2, 40, 32), (2, 9, 4)))
    everything = torch.ones(1, 9, 40, dtype=torch.bool)

    def ranks(query, keys):
        return select_topk(index_scores(query, keys, w), everything, 40)

    assert torch.equal(ranks(hadamard(q), hadamard(k)), ranks(q, k))
    assert not torch.equal(ranks(hadamard(q), k), ranks(q, k))
