import pytest
import torch
from backend_testing import available, pages_of

from kernels.cache_io import EntryLayout, pack, unpack
from kernels.paged_attention import BACKENDS, EntrySet, TokenRows, paged_attention
from kernels.sparse_attention import sparse_attention

B, H, WINDOW, T = 3, 5, 6, 9
FIRST = torch.tensor([0, 3, 40])
LAYOUTS = [EntryLayout(16, "fp8", 8, "bf16"), EntryLayout(16, "fp4", 8, "bf16"), EntryLayout(16, "fp32", 8, "fp32")]


def unpacked(query, window, first, rows, mask, sink, layout):
    """Return the attention of every sequence over its unpacked rows."""
    outputs = []
    for b, position in enumerate(first.tolist()):
        past = min(position, WINDOW - 1)
        window_kv = unpack(window[b : b + 1, WINDOW - 1 - past :], layout)
        entries = unpack(rows[b : b + 1], layout) if rows is not None else None
        own_mask = mask.expand(B, -1, -1)[b : b + 1] if mask is not None else None
        outputs.append(sparse_attention(query[b : b + 1], window_kv, entries, own_mask, sink, WINDOW)[0])
    return torch.cat(outputs)


@pytest.mark.parametrize("backend", available(BACKENDS))
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.body_format)
@pytest.mark.parametrize("kind", ["none", "visible", "chosen"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 19, 70])
@torch.no_grad()
def test_attention_over_pages_equals_attention_over_unpacked_rows(tokens, kind, layout, backend):
    query, sink = torch.randn(B, tokens, H, layout.size), torch.randn(H)
    window, first = pack(torch.randn(B, WINDOW - 1 + tokens, layout.size), layout), FIRST
    rows = None if kind == "none" else pack(torch.randn(B, T, layout.size), layout)
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
    expected = unpacked(query, window, first, rows, mask, sink, layout)
    linear = TokenRows(window, first - (WINDOW - 1), first)
    # A ring holds the row of every position at the index position % capacity.
    ring = torch.full((B, window.shape[1] + 2, layout.nbytes), 0xFF, dtype=torch.uint8)
    for b in range(B):
        for i in range(window.shape[1]):
            ring[b, (int(first[b]) - (WINDOW - 1) + i) % ring.shape[1]] = window[b, i]
    for token_rows in (linear, TokenRows(ring, torch.zeros(1, dtype=torch.int64), first)):
        found = paged_attention(query, token_rows, entries, sink, layout, WINDOW, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", available(BACKENDS))
@torch.no_grad()
def test_sizes_around_multiples_of_the_vector_width(backend):
    """Complete and incomplete tiles of heads, keys and columns."""
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


@pytest.mark.parametrize("backend", available(BACKENDS))
@pytest.mark.parametrize("kind", ["visible", "chosen"])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 5), (1, 8), (7, 4), (40, 3)])
@torch.no_grad()
def test_latents_without_a_window_have_narrower_values(tokens, heads, kind, backend):
    """Absorbed latent attention: the first dims of a key are its value, and the softmax scale is not that of a key."""
    layout, value_size, scale = EntryLayout(160, "fp8_128", 6, "bf16"), 160, 0.1
    query, rows = torch.randn(B, tokens, heads, layout.size), pack(torch.randn(B, T, layout.size), layout)
    if kind == "visible":
        visible = (torch.tensor([[1], [3], [T]]) + torch.arange(tokens)).clamp(max=T)
        mask, entries = torch.arange(T) < visible.unsqueeze(-1), EntrySet(pages_of(rows), visible=visible)
    else:
        chosen = torch.rand(B, tokens, T).argsort(-1)[..., :4]
        chosen[..., 2:][torch.rand(B, tokens, 2) < 0.5] = -1
        entries = EntrySet(pages_of(rows), chosen=chosen)
        mask = torch.zeros(B, tokens, T + 1, dtype=torch.bool).scatter_(-1, chosen % (T + 1), True)[..., :T]
    keys = unpack(rows, layout)
    logits = torch.einsum("bshc,btc->bsht", query, keys) * scale
    weights = logits.masked_fill(~mask.unsqueeze(2), float("-inf")).softmax(-1)
    expected = torch.einsum("bsht,btv->bshv", weights, keys[..., :value_size])
    found = paged_attention(query, None, entries, None, layout, 0, scale, value_size, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", available(BACKENDS))
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (1, 6), (1, 40), (5, 3), (9, 8)])
@torch.no_grad()
def test_many_entries_without_a_window_are_attended_to_in_tiles(tokens, heads, threads, backend, monkeypatch):
    monkeypatch.setattr("kernels.paged_attention.eager._TILE", 64)
    layout, scale, entries = EntryLayout(30, "fp32", 6, "fp32"), 0.7, 200
    query, rows, sink = torch.randn(B, tokens, heads, 36), torch.randn(B, entries, 36), torch.randn(heads)
    visible = (torch.tensor([[1], [62], [entries]]) + torch.arange(tokens)).clamp(max=entries)
    logits = torch.einsum("bshc,btc->bsht", query, rows) * scale
    logits = logits.masked_fill((torch.arange(entries) >= visible.unsqueeze(-1)).unsqueeze(2), float("-inf"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for some in (sink, None):
            end = torch.full((heads,), float("-inf")) if some is None else some
            weights = torch.cat((logits, end.view(1, 1, -1, 1).expand(B, tokens, -1, 1)), dim=-1).softmax(-1)
            expected = torch.einsum("bsht,btv->bshv", weights[..., :-1], rows[..., :30])
            pages = EntrySet(pages_of(pack(rows, layout)), visible=visible)
            found = paged_attention(query, None, pages, some, layout, 0, scale, 30, backend=backend)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)
