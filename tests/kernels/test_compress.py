"""The reference kernels against the formulas, written out naively."""

import math

import pytest
import torch

from kernels.compress import compress
from kernels.index_topk import index_scores, select_topk
from kernels.quantize import hadamard
from kernels.sparse_attention import sparse_attention


@pytest.mark.parametrize("past", [0, 3, 6])
@pytest.mark.parametrize("length", [1, 5, 7, 8, 23])
@pytest.mark.parametrize("gathered", [False, True])
def test_sparse_attention_is_one_softmax_over_window_entries_and_sink(length, past, gathered):
    torch.manual_seed(length)
    B, H, c, window, T = 2, 3, 8, 7, 5
    q, kv = torch.randn(B, length, H, c), torch.randn(B, past + length, c)
    entries = torch.randn(B, length, T, c) if gathered else torch.randn(B, T, c)
    mask, sink = torch.rand(B, length, T) < 0.6, torch.randn(H)
    out, mass = sparse_attention(q, kv, entries, mask, sink, window)
    for b in range(B):
        for s in range(length):
            keys = kv[b, max(0, past + s - window + 1) : past + s + 1]
            seen = (entries[b, s] if gathered else entries[b])[mask[b, s]]
            both = torch.cat((keys, seen))
            for h in range(H):
                logits = torch.cat((both @ q[b, s, h] / math.sqrt(c), sink[h : h + 1]))
                weights = logits.softmax(0)[:-1]
                torch.testing.assert_close(out[b, s, h], weights @ both, rtol=1e-4, atol=1e-5)
            expected = sum(
                torch.cat((both @ q[b, s, h] / math.sqrt(c), sink[h : h + 1])).softmax(0)[len(keys) : -1].sum()
                for h in range(H)
            )
            torch.testing.assert_close(mass[b, s].sum(), torch.as_tensor(expected), rtol=1e-4, atol=1e-5)


def test_masked_entries_leave_the_sliding_window():
    q, kv, sink = torch.randn(1, 40, 2, 8), torch.randn(1, 40, 8), torch.randn(2)
    alone, _ = sparse_attention(q, kv, None, None, sink, 16)
    nothing = torch.zeros(1, 40, 6, dtype=torch.bool)
    masked, mass = sparse_attention(q, kv, torch.randn(1, 6, 8), nothing, sink, 16)
    torch.testing.assert_close(masked, alone)
    assert mass.abs().max() == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_compress_pools_per_channel(overlap):
    m, c, n = 4, 3, 5
    w = 2 * c if overlap else c
    values, gates, bias = torch.randn(1, n * m, w), torch.randn(1, n * m, w), torch.randn(m, w)
    entries = compress(torch.cat((values, gates), dim=-1), bias, overlap)
    assert entries.shape == (1, n, c)
    for i in range(n):
        for channel in range(c):
            own = c + channel if overlap else channel
            rows = [(i * m + j, own, j) for j in range(m)]
            if overlap and i:
                rows += [((i - 1) * m + j, channel, j) for j in range(m)]
            logits = torch.stack([gates[0, t, ch] + bias[j, ch] for t, ch, j in rows])
            pooled = logits.softmax(0) @ torch.stack([values[0, t, ch] for t, ch, _ in rows])
            torch.testing.assert_close(entries[0, i, channel], pooled)


def test_compress_goes_on_from_a_previous_block():
    m, c = 4, 3
    rows, bias = torch.randn(2, 20, 4 * c), torch.randn(m, 2 * c)
    whole = compress(rows, bias, True)
    later = compress(rows[:, 8:], bias, True, has_previous=True)
    torch.testing.assert_close(later, whole[:, 3:])


def test_index_scores_follow_the_formula():
    q, k, w = torch.randn(2, 3, 4, 8), torch.randn(2, 6, 8), torch.randn(2, 3, 4)
    expected = torch.zeros(2, 3, 6)
    for b, s, t, h in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 6, 4))).tolist():
        expected[b, s, t] += w[b, s, h] * max(0.0, float(q[b, s, h] @ k[b, t]))
    torch.testing.assert_close(index_scores(q, k, w), expected, rtol=1e-4, atol=1e-5)


def test_ties_go_to_the_lower_entry_and_the_invisible_is_never_chosen():
    scores = torch.tensor([[[0.0, -0.0, 5.0, 0.0, 0.0, 9.0], [-1.0, -2.0, -1.0, -3.0, 7.0, 7.0]]])

    def first(*counts):
        return torch.arange(6) < torch.tensor([counts]).unsqueeze(-1)

    assert select_topk(scores, first(5, 4), 3).tolist() == [[[2, 0, 1], [0, 2, 1]]]
    assert select_topk(scores, first(0, 2), 3).tolist() == [[[-1, -1, -1], [0, 1, -1]]]
    assert select_topk(scores, first(5, 4), 8)[0, 0].tolist()[-3:] == [-1, -1, -1]
    assert select_topk(scores, ~first(1, 4), 2).tolist() == [[[5, 2], [4, 5]]]


def test_hadamard_on_both_sides_leaves_the_unquantised_choice_alone():
    q, k, w = (torch.randn(s, dtype=torch.float64) for s in ((2, 9, 4, 32), (2, 40, 32), (2, 9, 4)))
    everything = torch.ones(1, 9, 40, dtype=torch.bool)

    def ranks(query, keys):
        return select_topk(index_scores(query, keys, w), everything, 40)

    assert torch.equal(ranks(hadamard(q), hadamard(k)), ranks(q, k))
    assert not torch.equal(ranks(hadamard(q), k), ranks(q, k))
