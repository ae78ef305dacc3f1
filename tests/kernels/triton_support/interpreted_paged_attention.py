"""Run by test_interpreted.py with TRITON_INTERPRET=1."""

import pytest
import torch

from kernels.cache_io import EntryLayout, Pages, pack
from kernels.paged_attention import EntrySet, TokenRows, paged_attention
from kernels.triton_support.platform import checked_selections

B, T, WINDOW = 2, 37, 19


def pages_of(rows, page_size=4):
    """Store rows [B, T, nbytes] in scattered pages among others that must not be read."""
    count = -(-rows.shape[1] // page_size)
    table = torch.randperm(B * count + 3)[: B * count].view(B, count)
    storage = torch.full(((B * count + 3) * page_size, rows.shape[2]), 0xFF, dtype=torch.uint8)
    for b in range(B):
        for i in range(rows.shape[1]):
            storage[table[b, i // page_size] * page_size + i % page_size] = rows[b, i]
    return Pages(storage, page_size, table)


def inputs(layout, tokens, heads, kind):
    query, sink = torch.randn(B, tokens, heads, layout.size), torch.randn(heads)
    first = torch.tensor([40, 3])
    rows = pack(torch.randn(B, WINDOW + tokens + 2, layout.size), layout, backend="reference")
    window = TokenRows(rows, torch.tensor([7, 1]), first)
    packed = pack(torch.randn(B, T, layout.size), layout, backend="reference")
    if kind == "chosen":
        chosen = torch.rand(B, tokens, T).argsort(-1)[..., :18].masked_fill(torch.rand(B, tokens, 18) < 0.3, -1)
        chosen[0, 0] = -1
        entries = EntrySet(pages_of(packed), chosen=chosen)
    elif kind == "visible":
        visible = torch.tensor([[0], [T - tokens + 1]]) + torch.arange(tokens)
        entries = EntrySet(pages_of(packed), visible=visible)
    else:
        entries = None
    return query, window, entries, sink


LAYOUTS = [EntryLayout(448, "fp8", 64), EntryLayout(40, "fp4", 8), EntryLayout(128, "fp8_128", 16)]


@pytest.mark.parametrize(
    ("layout", "tokens", "heads", "kind"),
    [
        (LAYOUTS[0], 1, 3, "chosen"),
        (LAYOUTS[1], 2, 20, "visible"),
        (LAYOUTS[2], 3, 2, "none"),
        (EntryLayout(300, "fp8", 20), 1, 2, "visible"),  # pieces of 256, 32 and 12 dims
        (EntryLayout(70, "bf16", 10), 1, 2, "chosen"),
    ],
    ids=str,
)
def test_attention_over_packed_rows_equals_the_reference(layout, tokens, heads, kind):
    query, window, entries, sink = inputs(layout, tokens, heads, kind)
    arguments = query, window, entries, sink, layout, WINDOW
    found = paged_attention(*arguments, backend="triton")
    torch.testing.assert_close(found, paged_attention(*arguments, backend="reference"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e-9, 1e-4, 1.0, 1e9, 1e28])
def test_rows_of_any_magnitude(size):
    """E4M3 rows are unpacked to smaller numbers, which must neither vanish nor overflow."""
    layout = EntryLayout(64, "fp8", 16)
    query, *_ = inputs(layout, 2, 3, "none")
    packed = pack(torch.randn(B, T, 80) * size, layout, backend="reference")
    entries = EntrySet(pages_of(packed), visible=torch.full((1, 2), T))
    arguments = query / max(1.0, size), None, entries, None, layout
    found, expected = (paged_attention(*arguments, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(found / size, expected / size, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value_size", [30, 45])
def test_entries_alone_with_narrow_values_and_without_a_sink(value_size):
    layout = EntryLayout(40, "fp8", 8)
    query, _, entries, _ = inputs(layout, 2, 2, "visible")
    entries = EntrySet(entries.pages, visible=entries.visible + 1)
    entries.visible.clamp_(max=T)
    options = {"scale": 0.3, "value_size": value_size}
    found = paged_attention(query, None, entries, None, layout, backend="triton", **options)
    expected = paged_attention(query, None, entries, None, layout, backend="reference", **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_number_of_splits_does_not_change_the_result(monkeypatch):
    from kernels.paged_attention import triton

    arguments = *inputs(LAYOUTS[1], 1, 2, "visible"), LAYOUTS[1], WINDOW
    results = []
    for multiprocessors in (1, 2, 100):
        monkeypatch.setattr(triton, "multiprocessors", lambda device, n=multiprocessors: n)
        results.append(paged_attention(*arguments, backend="triton"))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-5, atol=1e-6)


def test_selections_out_of_range_are_caught_in_debug_mode():
    query, window, entries, sink = inputs(LAYOUTS[1], 1, 2, "chosen")
    entries.chosen[1, 0, 3] = 40  # the pages have room for 40 rows
    with checked_selections(), pytest.raises(IndexError, match=r"selection \[1, 0, 3\] is 40, of 40 entries"):
        paged_attention(query, window, entries, sink, LAYOUTS[1], WINDOW, backend="triton")


def test_unsupported_layouts_are_refused_with_the_supported_set():
    for layout, message in (
        (EntryLayout(32, "fp32"), "body formats bf16, fp8, fp8_128, fp4; found fp32"),
        (EntryLayout(32, "fp8", 8, "fp32"), "rope format bf16; found fp32"),
        (EntryLayout(1024, "fp8"), "at most 576 dims after padding; found 1024"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(torch.zeros(1, 1, 2, layout.size), None, None, None, layout, backend="triton")
