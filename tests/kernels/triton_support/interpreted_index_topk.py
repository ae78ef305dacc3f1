"""Run by test_interpreted.py with TRITON_INTERPRET=1."""

import pytest
import torch

from kernels.cache_io import EntryLayout, Pages, pack
from kernels.index_topk import index_topk, triton
from kernels.triton_support.tiles import Tile


def paged(packed, page_size=5):
    """Store rows [B, T, nbytes] in scattered pages among others that must not be read."""
    B, T, nbytes = packed.shape
    count = -(-T // page_size)
    table = torch.randperm(B * count + 2)[: B * count].view(B, count)
    storage = torch.full(((B * count + 2) * page_size, nbytes), 0xFF, dtype=torch.uint8)
    for b in range(B):
        for i in range(T):
            storage[table[b, i // page_size] * page_size + i % page_size] = packed[b, i]
    return Pages(storage, page_size, table)


def inputs(layout, tokens, heads, entries, largest=2):
    """Return queries, keys and weights of small integers: sums are exact, and many scores are equal."""
    query = torch.randint(-largest, largest + 1, (2, tokens, heads, layout.size)).float()
    keys = torch.randint(-largest, largest + 1, (2, entries, layout.size)).float()
    keys[..., 0] = largest  # all blocks have the same scale
    weights = torch.randint(-2, 3, (2, tokens, heads)).float()
    return query, paged(pack(keys, layout, backend="reference")), layout, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "tokens", "heads", "entries", "k"),
    [
        (EntryLayout(32, "fp4"), 5, 3, 75, 9),
        (EntryLayout(128, "fp4"), 1, 20, 33, 16),
        (EntryLayout(24, "bf16"), 2, 2, 140, 70),
    ],
    ids=str,
)
def test_the_selection_is_exact_with_ties_to_the_lower_index(layout, tokens, heads, entries, k, dtype):
    arguments = inputs(layout, tokens, heads, entries)
    visible = torch.stack((torch.arange(tokens) * 17 % (entries + 1), entries - torch.arange(tokens)))
    found = index_topk(*arguments, visible, k, dtype, backend="triton")
    assert torch.equal(found, index_topk(*arguments, visible, k, dtype, backend="reference"))


@pytest.mark.parametrize(("dtype", "best"), [(torch.float32, [15, 14, 13, 12]), (torch.bfloat16, [15, 14, 11, 12])])
def test_scores_are_rounded_before_they_are_compared(dtype, best):
    layout, keys, query = EntryLayout(16, "bf16"), torch.zeros(1, 16, 16), torch.zeros(1, 1, 1, 16)
    keys[..., 0], keys[..., 1], query[..., 0], query[..., 1] = 16, torch.arange(16), 16, 1
    pages, limits = paged(pack(keys, layout, backend="reference")), torch.full((1, 1), 16)
    # In BF16, 267, 268 and 269 are 268.
    found = index_topk(query, pages, layout, torch.ones(1, 1, 1), limits, 4, dtype, backend="triton")
    assert found.tolist() == [[best]]


def test_selection_in_segments_and_in_pieces_of_the_queries(monkeypatch):
    arguments = inputs(EntryLayout(16, "fp8"), 4, 2, 100, largest=1)
    visible = torch.tensor([[0, 64, 65, 100]])
    expected = index_topk(*arguments, visible, 7, backend="reference")
    for rows, workspace, segment in ((1000, 2 * 100 * 3, 32), (0, 1, 32)):
        monkeypatch.setattr(triton, "_MANY_ROWS", rows)
        monkeypatch.setattr(triton, "_MAX_WORKSPACE_SCORES", workspace)
        monkeypatch.setattr(triton, "_SEGMENT", segment)
        assert torch.equal(index_topk(*arguments, visible, 7, backend="triton"), expected)


def test_equal_scores_across_segments_go_to_the_lower_index(monkeypatch):
    monkeypatch.setattr(triton, "_SEGMENT", 16)
    monkeypatch.setitem(triton.SELECT_TILES, "interpreter", (Tile(4, 1, {"TILE": 16}),))
    layout = EntryLayout(16, "fp8")
    query, _, _, weights = inputs(layout, 1, 2, 1)
    keys = paged(pack(torch.zeros(2, 90, 16), layout, backend="reference"))
    found = index_topk(query, keys, layout, weights, torch.tensor([[90]]), 6, backend="triton")
    assert found.tolist() == [[[0, 1, 2, 3, 4, 5]]] * 2


def test_nothing_is_selected_without_visible_entries():
    arguments = inputs(EntryLayout(16, "fp4"), 2, 1, 20)
    found = index_topk(*arguments, torch.tensor([[0, 0]]), 3, backend="triton")
    assert found.tolist() == [[[-1] * 3] * 2] * 2


def test_random_scores_agree_with_float64():
    layout = EntryLayout(64, "fp4")
    keys = pack(torch.randn(1, 100, 64), layout, backend="reference")
    query, weights = torch.randn(1, 3, 4, 64), torch.randn(1, 3, 4)
    from kernels.cache_io.reference import unpack

    products = torch.einsum("bshc,btc->bsht", query.double(), unpack(keys, layout).double()).relu()
    best = (products * weights.double().unsqueeze(-1)).sum(2).topk(10, dim=-1)
    pages = Pages(keys[0], 100, torch.zeros(1, 1, dtype=torch.int64))
    found = index_topk(query, pages, layout, weights, torch.full((1, 3), 100), 10, backend="triton")
    assert torch.equal(found, best.indices)


def test_unsupported_inputs_are_refused_with_the_supported_set():
    query, keys, layout, weights = inputs(EntryLayout(16, "fp4"), 1, 1, 5)
    visible = torch.tensor([[5]])
    with pytest.raises(ValueError, match=r"supports k up to 4096; found 4097$"):
        index_topk(query, keys, layout, weights, visible, 4097, backend="triton")
    with pytest.raises(ValueError, match=r"supports keys in one of bf16, fp8, fp8_128, fp4; found .*fp32"):
        index_topk(query, keys, EntryLayout(16, "fp32"), weights, visible, 1, backend="triton")
    with pytest.raises(ValueError, match=r"supports heads up to 128; found 129$"):
        index_topk(query.expand(-1, -1, 129, -1), keys, layout, weights, visible, 1, backend="triton")
    with pytest.raises(ValueError, match=r"supports dtypes of scores float32, bfloat16; found float16$"):
        index_topk(query, keys, layout, weights, visible, 1, torch.float16, backend="triton")
