"""Attention over a cache's packed rows against the readable one."""

import pytest
import torch

from kernels import native
from kernels.cache_io import EntryLayout, Pages, pack, unpack
from kernels.sparse_attention import EntrySet, TiledAttention, TokenRows, paged_attention, sparse_attention

B, H, WINDOW, T = 3, 5, 6, 9
FIRST = torch.tensor([0, 3, 40])
LAYOUTS = [EntryLayout(16, "fp8", 8, "bf16"), EntryLayout(16, "fp4", 8, "bf16"), EntryLayout(16, "fp32", 8, "fp32")]
BACKENDS = ["paged", "cpu"] if native.level() is not None else ["paged"]


def case(tokens, entries, layout):
    """Queries, window rows, positions of the first queries, entry rows, their mask and the sink."""
    rows = {"none": None, "shared": (B, T), "common": (1, T), "gathered": (B, tokens, T)}[entries]
    mask = None
    if rows is not None:
        mask = torch.rand(rows[0], tokens, T) < 0.5
        mask[0, 0] = False
        rows = pack(torch.randn(*rows, layout.size), layout)
    window = pack(torch.randn(B, WINDOW - 1 + tokens, layout.size), layout)
    return torch.randn(B, tokens, H, layout.size), window, FIRST, rows, mask, torch.randn(H)


def readable(query, window, first, rows, mask, sink, layout):
    outputs = []
    for b, position in enumerate(first.tolist()):
        past = min(position, WINDOW - 1)
        window_kv = unpack(window[b : b + 1, WINDOW - 1 - past :], layout)
        entries = unpack(rows.expand(B, *rows.shape[1:])[b : b + 1], layout) if rows is not None else None
        its_mask = mask.expand(B, -1, -1)[b : b + 1] if mask is not None else None
        outputs.append(sparse_attention(query[b : b + 1], window_kv, entries, its_mask, sink, WINDOW)[0])
    return torch.cat(outputs)


def pages_of(rows, per_page=4):
    """Entry rows uint8 [B, T, nbytes] in scattered pages among others that nobody may read."""
    count = -(-rows.shape[1] // per_page)
    numbers = torch.randperm(B * count + 3)[: B * count].view(B, count)
    storage = torch.full(((B * count + 3) * per_page, rows.shape[2]), 0xFF, dtype=torch.uint8)
    for b in range(B):
        for i in range(rows.shape[1]):
            storage[numbers[b, i // per_page] * per_page + i % per_page] = rows[b, i]
    return Pages(storage, per_page, numbers)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.body_format)
@pytest.mark.parametrize("kind", ["none", "visible", "chosen"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 19, 70])
@torch.no_grad()
def test_paged_attention_is_the_readable_one(tokens, kind, layout, backend):
    query, window, first, rows, _, sink = case(tokens, "none" if kind == "none" else "shared", layout)
    entries = mask = None
    if kind == "visible":
        visible = (torch.arange(tokens) // 3).clamp(max=T) + torch.tensor([[0], [2], [T]])
        visible = visible.clamp(max=T)
        mask = torch.arange(T) < visible.unsqueeze(-1)
        entries = EntrySet(pages_of(rows), visible=visible)
    elif kind == "chosen":
        chosen = torch.rand(B, tokens, T).argsort(-1)[..., :4].masked_fill(torch.rand(B, tokens, 4) < 0.3, -1)
        chosen[0, 0] = -1
        mask = torch.zeros(B, tokens, T + 1, dtype=torch.bool).scatter_(-1, chosen % (T + 1), True)[..., :T]
        entries = EntrySet(pages_of(rows), chosen=chosen)
    expected = readable(query, window, first, rows, mask, sink, layout)
    linear = TokenRows(window, first - (WINDOW - 1), first)
    # The same rows in a ring: at their positions modulo its size.
    ring = torch.full((B, window.shape[1] + 2, layout.nbytes), 0xFF, dtype=torch.uint8)
    for b in range(B):
        for i in range(window.shape[1]):
            ring[b, (int(first[b]) - (WINDOW - 1) + i) % ring.shape[1]] = window[b, i]
    for tokens_rows in (linear, TokenRows(ring, torch.zeros(1, dtype=torch.int64), first)):
        found = paged_attention(query, tokens_rows, entries, sink, layout, WINDOW, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_native_loops_take_whole_and_broken_vectors(backend):
    """Wide heads, a long window and many entries: full tiles of heads, keys and columns, and what is left over."""
    layout = EntryLayout(112, "fp8", 16, "bf16")
    for heads, tokens in ((8, 1), (7, 40), (1, 3)):
        query, sink = torch.randn(B, tokens, heads, 128), torch.randn(heads)
        window = pack(torch.randn(B, 99 + tokens, 128), layout)
        first, rows = torch.tensor([0, 50, 700]), pack(torch.randn(B, 77, 128), layout)
        visible = torch.full((1, tokens), 77)
        mask = torch.ones(1, tokens, 77, dtype=torch.bool)
        expected = []
        for b, position in enumerate(first.tolist()):
            kv = unpack(window[b : b + 1, 99 - min(position, 99) :], layout)
            expected.append(sparse_attention(query[b : b + 1], kv, unpack(rows[b : b + 1], layout), mask, sink, 100)[0])
        for entries in ({"visible": visible}, {"chosen": torch.arange(77).expand(B, tokens, -1)}):
            found = paged_attention(
                query,
                TokenRows(window, first - 99, first),
                EntrySet(pages_of(rows), **entries),
                sink,
                layout,
                100,
                backend=backend,
            )
            torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


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
