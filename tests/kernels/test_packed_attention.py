"""Attention straight from packed rows against the readable one."""

import pytest
import torch

from kernels.cache_io import EntryLayout, pack, unpack
from kernels.sparse_attention import TiledAttention, packed_attention, sparse_attention, token_attention

B, H, WINDOW, T = 3, 2, 6, 9
LAYOUTS = [EntryLayout(16, "fp8", 8, "bf16"), EntryLayout(16, "fp4", 8, "bf16"), EntryLayout(16, "fp32", 8, "fp32")]


def case(tokens, entries, layout):
    """Queries, window rows, positions of the first queries, entry rows, their mask and the sink."""
    rows = {"none": None, "shared": (B, T), "common": (1, T), "gathered": (B, tokens, T)}[entries]
    mask = None
    if rows is not None:
        mask = torch.rand(rows[0], tokens, T) < 0.5
        mask[0, 0] = False
        rows = pack(torch.randn(*rows, layout.size), layout)
    window = pack(torch.randn(B, WINDOW - 1 + tokens, layout.size), layout)
    return torch.randn(B, tokens, H, layout.size), window, torch.tensor([0, 3, 40]), rows, mask, torch.randn(H)


def readable(query, window, first, rows, mask, sink, layout):
    outputs = []
    for b, position in enumerate(first.tolist()):
        past = min(position, WINDOW - 1)
        window_kv = unpack(window[b : b + 1, WINDOW - 1 - past :], layout)
        entries = unpack(rows.expand(B, *rows.shape[1:])[b : b + 1], layout) if rows is not None else None
        its_mask = mask.expand(B, -1, -1)[b : b + 1] if mask is not None else None
        outputs.append(sparse_attention(query[b : b + 1], window_kv, entries, its_mask, sink, WINDOW)[0])
    return torch.cat(outputs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.body_format)
@pytest.mark.parametrize("entries", ["none", "shared", "common", "gathered"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 19])
def test_packed_attention_is_the_readable_one(tokens, entries, layout):
    query, window, first, rows, mask, sink = given = case(tokens, entries, layout)
    found = packed_attention(query, window, first, rows, mask, sink, layout, WINDOW)
    torch.testing.assert_close(found, readable(*given, layout), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [1, 4, 9])
@pytest.mark.parametrize("entries", ["none", "shared", "gathered"])
def test_tiled_attention_is_the_readable_one(entries, tile):
    layout, tokens = LAYOUTS[0], 7
    query, window, first, rows, mask, sink = given = case(tokens, entries, layout)
    attention = TiledAttention(query.flatten(0, 1), sink)
    near = unpack(window, layout).unfold(1, WINDOW, 1).transpose(2, 3).flatten(0, 1)
    positions = (first.unsqueeze(-1) + torch.arange(tokens)).flatten().unsqueeze(-1)
    attention.add(near, torch.arange(WINDOW - 1, -1, -1) <= positions)
    if rows is not None:
        keys = unpack(rows, layout)
        keys = (keys if keys.dim() == 4 else keys.unsqueeze(1).expand(B, tokens, -1, -1)).flatten(0, 1)
        for begin in range(0, T, tile):
            attention.add(keys[:, begin : begin + tile], mask.flatten(0, 1)[:, begin : begin + tile])
    found = attention.output().view(B, tokens, H, -1)
    torch.testing.assert_close(found, readable(*given, layout), rtol=1e-5, atol=1e-5)


def test_tiles_without_anything_to_see_change_no_bit():
    query, keys, mask = torch.randn(16, H, 24), torch.randn(16, 5, 24), torch.rand(16, 5) < 0.7
    mask[0] = False  # this one sees the sink alone
    alone, among = (TiledAttention(query, torch.randn(H, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    alone.add(keys, mask)
    for _ in range(3):
        among.add(torch.randn(16, 64, 24) * 100, torch.zeros(16, 64, dtype=torch.bool))
    among.add(keys, mask)
    among.add(torch.randn(16, 64, 24) * 100, torch.zeros(16, 64, dtype=torch.bool))
    assert torch.equal(among.output(), alone.output())
    assert torch.equal(alone.output()[0], torch.zeros(H, 24))


def test_values_may_differ_from_keys():
    query, keys, values = torch.randn(4, H, 8), torch.randn(4, 11, 8), torch.randn(4, 11, 8)
    attention = TiledAttention(query, torch.full((H,), float("-inf")))
    for some in (slice(0, 5), slice(5, 11)):
        attention.add(keys[:, some], torch.ones(4, some.stop - some.start, dtype=torch.bool), values[:, some])
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    torch.testing.assert_close(attention.output(), expected)


def test_one_tokens_attention_is_the_readable_one_in_any_order():
    query, kv, entries, sink = torch.randn(H, 24), torch.randn(WINDOW, 24), torch.randn(T, 24), torch.randn(H)
    mask = torch.rand(T) < 0.5
    expected = sparse_attention(
        query.expand(1, WINDOW, H, 24), kv[None], entries[None], mask.expand(1, WINDOW, T), sink, WINDOW
    )
    order = torch.randperm(WINDOW)
    seen, more = torch.ones(WINDOW, dtype=torch.bool), torch.randn(3, 24) * 100
    groups = [(kv[order], seen), (more, torch.zeros(3, dtype=torch.bool)), (entries, mask)]
    torch.testing.assert_close(token_attention(query, groups, sink), expected[0][0, -1], rtol=1e-5, atol=1e-5)
