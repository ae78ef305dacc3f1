"""Implementations of grouped-query decoding, the crossover, and the script."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import against_gqa
from benchmarks.against_gqa import ATTENTIONS, GroupedQueryPair, crossover, flash_pair


@pytest.mark.parametrize("name", ATTENTIONS)
def test_implementations_equal_grouped_query_attention(name):
    query, key, value = torch.randn(64, 128), torch.randn(8, 40, 128), torch.randn(8, 40, 128)
    expanded = [x.repeat_interleave(8, dim=0) for x in (key, value)]
    expected = F.scaled_dot_product_attention(query.unsqueeze(1), *expanded).squeeze(1)
    torch.testing.assert_close(ATTENTIONS[name](query, key, value), expected)


def test_decoding_writes_the_last_position_only():
    pair = GroupedQueryPair(flash_pair("small", 1))
    stores = pair.stores(64)
    before = [store.clone() for store in stores]
    out = pair.decode(torch.randn(512).bfloat16(), stores, ATTENTIONS["two bmm"])
    assert out.isfinite().all() and out.dtype == torch.bfloat16
    for store, old in zip(stores, before):
        assert torch.equal(store[:, :, :-1], old[:, :, :-1])
        assert not torch.equal(store[:, :, -1], old[:, :, -1])


def test_crossover_is_interpolated_logarithmically():
    assert crossover({1024: 0.5, 4096: 2.0}) == pytest.approx(2048)
    assert crossover({1024: 2.0, 4096: 0.5, 16_384: 2.0}) == pytest.approx(8192)
    assert crossover({1024: 2.0, 4096: 3.0}) is None


def test_script():
    text = against_gqa.main(
        [
            "--preset",
            "small",
            "--lengths",
            "256",
            "512",
            "--rounds",
            "2",
            "--threads",
            "1",
            "--feed-forward",
        ]
    )
    for part in (
        "Mixers only",
        "With a feed-forward of 768",
        "| 512 | ",
        "Crossover",
        "ours, defaults",
        "ours, fastest",
    ):
        assert part in text
