"""Grouped-query attention over the packed keys and values of a cache."""

import pytest
import torch
from backend_testing import available, needs_native, pages_of

from kernels.cache_io import EntryLayout, Pages, pack
from kernels.grouped_attention import BACKENDS, backend_for, grouped_attention

B, T, PAGE = 3, 200, 4
FORMATS = ["bf16", "fp8", "fp32"]


def case(tokens, heads, kv_heads, c, body_format):
    layout = EntryLayout(kv_heads * 2 * c, body_format)
    query = torch.randn(B, tokens, heads, c)
    pages = pages_of(pack(torch.randn(B, T, layout.size), layout), PAGE)
    visible = (torch.tensor([[1], [62], [T]]) + torch.arange(tokens)).clamp(max=T)
    return query, pages, visible, kv_heads, layout


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 1), (10, 2), (12, 12), (40, 4)])
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("body_format", FORMATS)
@torch.no_grad()
def test_backends_equal_the_reference(body_format, tokens, heads):
    inputs = case(tokens, *heads, 12, body_format)
    expected = grouped_attention(*inputs, backend="reference")
    for backend in available(BACKENDS):
        torch.testing.assert_close(grouped_attention(*inputs, backend=backend), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_reference_equals_attention_with_one_copy_of_keys_per_head():
    """Each head attends with the key and value at its group's place in a row."""
    c, heads, kv_heads = 8, 6, 3
    query, pages, visible, _, layout = case(2, heads, kv_heads, c, "fp32")
    found = grouped_attention(query, pages, visible, kv_heads, layout, backend="reference")
    rows = pages.storage.view(torch.float32)[(pages.page_table.unsqueeze(-1) * PAGE + torch.arange(PAGE)).flatten(1)]
    for b in range(B):
        for s in range(2):
            for h in range(heads):
                begin = h // 2 * 2 * c
                key, value = rows[b, : visible[b, s], begin : begin + 2 * c].split(c, dim=-1)
                weights = (key @ query[b, s, h] * c**-0.5).softmax(0)
                torch.testing.assert_close(found[b, s, h], weights @ value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("backend", available(BACKENDS))
@torch.no_grad()
def test_a_shared_length_and_threads(backend, threads):
    query, pages, _, kv_heads, layout = case(1, 4, 2, 16, "bf16")
    visible = torch.full((1, 1), 131)
    expected = grouped_attention(query, pages, visible.expand(B, -1), kv_heads, layout, backend="reference")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = grouped_attention(query, pages, visible, kv_heads, layout, backend=backend)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_native
@torch.no_grad()
def test_decoding_runs_natively():
    assert backend_for(torch.zeros(1, 1, 4, 8)) == "cpu"
    assert backend_for(torch.zeros(1, 500, 4, 8)) == "eager"
    with torch.enable_grad():
        assert backend_for(torch.zeros(1, 1, 4, 8)) == "eager"


@needs_native
def test_sizes_that_do_not_match_are_refused():
    query, pages, visible, _, layout = case(1, 4, 2, 16, "bf16")
    narrow = Pages(pages.storage[:, :-2].contiguous(), PAGE, pages.page_table)
    calls = [(pages, visible, kv_heads, "key-value heads") for kv_heads in (1, 3, 0)]
    calls += [(pages, visible[:2], 2, "visible"), (narrow, visible, 2, "expected contiguous rows of 128 bytes")]
    calls += [(pages, visible * 0 + n, 2, "visible must be from 1 to the 200 rows") for n in (0, T + 1)]
    for pages, visible, kv_heads, message in calls:
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            grouped_attention(query, pages, visible, kv_heads, layout, backend="cpu")
