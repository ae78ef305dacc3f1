import pytest
import torch
from backend_testing import needs_native

from kernels.compress import compress, compress_next


@pytest.mark.parametrize("overlap", [False, True])
def test_tokens_are_pooled_per_channel(overlap):
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


def test_compression_continues_after_a_previous_block():
    m, c = 4, 3
    rows, bias = torch.randn(2, 20, 4 * c), torch.randn(m, 2 * c)
    whole = compress(rows, bias, True)
    later = compress(rows[:, 8:], bias, True, has_previous=True)
    torch.testing.assert_close(later, whole[:, 3:])


@needs_native
@pytest.mark.parametrize(("overlap", "has_previous"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("m", "c"), [(1, 1), (4, 6), (16, 33)])
@torch.no_grad()
def test_cpu_equals_the_reference(m, c, overlap, has_previous):
    width = 2 * c if overlap else c
    rows, bias = torch.randn(2, 5 * m, 2 * width) * 3, torch.randn(m, width)
    found, expected = (compress(rows, bias, overlap, has_previous, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_native
def test_cpu_propagates_nan_and_refuses_packed_documents():
    rows, bias = torch.randn(1, 3, 64), torch.zeros(3, 32)
    rows[0, 1, 5] = float("nan")
    assert compress(rows, bias, False, backend="cpu").isnan().any()
    with pytest.raises(ValueError, match="the cpu backend does not support packed documents"):
        compress(rows, bias, False, starts=torch.zeros(1, 1, dtype=torch.bool), backend="cpu")


def ring_of(rows, lengths, capacity):
    """Return a ring buffer [B, capacity, width] with the rows of the newest tokens, and noise in unused places."""
    ring = torch.randn(len(rows), capacity, rows.shape[2])
    for own, kept, length in zip(rows, ring, lengths):
        for p in range(max(0, length - capacity), length):
            kept[p % capacity] = own[p]
    return ring


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("m", [2, 4, 7])
@pytest.mark.parametrize("new", [1, 2, 9, 30])
@torch.no_grad()
def test_completed_blocks_of_a_ragged_batch(backend, overlap, m, new):
    """Entries equal those of whole sequences, at every offset in a block."""
    c, lengths = 5, [0, 1, m - 1, m, m + 1, 2 * m - 1, 2 * m, 5 * m + 2]
    width = 2 * c if overlap else c
    rows, bias = torch.randn(len(lengths), max(lengths) + new, 2 * width) * 3, torch.randn(m, width)
    added = torch.stack([own[length : length + new] for own, length in zip(rows, lengths)])
    ring = ring_of(rows, lengths, (2 * m - 1 if overlap else m - 1) + 2)
    found = compress_next(ring, added, bias, lengths, overlap, backend=backend)
    counts = [(length + new) // m - length // m for length in lengths]
    assert found.shape == (len(lengths), max(counts), c)
    for own, entries, length, count in zip(rows, found, lengths, counts):
        whole = compress(own[None, : (length + new) // m * m], bias, overlap, backend="reference")[0]
        torch.testing.assert_close(entries[:count], whole[length // m :], rtol=1e-5, atol=1e-5)
        assert not entries[count:].any()


@needs_native
def test_rings_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="compress_next: ring"):
        compress_next(torch.zeros(1, 2, 4), torch.zeros(1, 1, 4), torch.zeros(4, 2), [3], False, backend="cpu")
