import pytest
import torch
from backend_testing import needs_native

from kernels.cache_io import EntryLayout, Pages, unpack
from kernels.compress import DocumentBlocks, Finish, compress, compress_next
from kernels.compress.reference import pooled
from kernels.quantize import round_to_layout

BACKENDS = ["reference", "eager", pytest.param("cpu", marks=needs_native)]


def finish_of(n, c, r=1, hadamard=False, batch=1):
    angles = torch.rand(batch, n, r) * 6
    return Finish(torch.rand(c) + 0.5, 1e-3, angles.cos(), angles.sin(), hadamard)


@pytest.mark.parametrize("overlap", [False, True])
def test_tokens_are_pooled_per_channel(overlap):
    m, c, n = 4, 3, 5
    w = 2 * c if overlap else c
    values, gates, bias = torch.randn(1, n * m, w), torch.randn(1, n * m, w), torch.randn(m, w)
    entries = pooled(torch.cat((values, gates), dim=-1), bias, overlap, False)
    assert entries.shape == (1, n, c)
    for i in range(n):
        for channel in range(c):
            own = c + channel if overlap else channel
            rows = [(i * m + j, own, j) for j in range(m)]
            if overlap and i:
                rows += [((i - 1) * m + j, channel, j) for j in range(m)]
            logits = torch.stack([gates[0, t, ch] + bias[j, ch] for t, ch, j in rows])
            one = logits.softmax(0) @ torch.stack([values[0, t, ch] for t, ch, _ in rows])
            torch.testing.assert_close(entries[0, i, channel], one)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_pooled_entries_are_normalized_rotated_and_rounded(backend):
    m, c, n, r, layout = 4, 64, 3, 5, EntryLayout(48, "fp8", 16)
    rows, bias, finish = torch.randn(2, n * m, 2 * c), torch.randn(m, c), finish_of(n, c, r, batch=2)
    expected = pooled(rows, bias, False, False)
    expected = expected / (expected.square().mean(-1, keepdim=True) + 1e-3).sqrt() * finish.norm_weight
    pairs = torch.view_as_complex(expected[..., -2 * r :].unflatten(-1, (-1, 2)).contiguous())
    expected[..., -2 * r :] = torch.view_as_real(pairs * torch.complex(finish.cos, finish.sin)).flatten(-2)
    found = compress(rows, bias, finish, False, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    rounded = compress(rows, bias, finish, False, layout=layout, backend=backend)
    assert torch.equal(rounded, round_to_layout(found, layout)) and not torch.equal(rounded, found)
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for i in range(c)] for j in range(c)])
    found = compress(rows, bias, finish._replace(hadamard=True), False, backend=backend)
    torch.testing.assert_close(found, expected @ signs / c**0.5, rtol=1e-5, atol=1e-5)


def test_rounding_passes_gradients_through():
    rows, bias, finish, layout = (
        torch.randn(1, 12, 128),
        torch.randn(4, 64),
        finish_of(3, 64, 8),
        EntryLayout(64, "fp4"),
    )

    def gradients(backend, layout):
        leaves = [x.clone().requires_grad_() for x in (rows, bias, finish.norm_weight)]
        entries = compress(*leaves[:2], finish._replace(norm_weight=leaves[2]), False, layout=layout, backend=backend)
        return torch.autograd.grad(entries, leaves, torch.ones_like(entries) + torch.arange(64))

    expected = gradients("reference", None)
    for backend, rounding in (("reference", layout), ("eager", layout), ("eager", None)):
        for x, y in zip(gradients(backend, rounding), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_compression_continues_after_a_previous_block():
    m, c = 4, 3
    rows, bias, finish = torch.randn(2, 20, 4 * c), torch.randn(m, 2 * c), finish_of(5, c)
    whole = compress(rows, bias, finish, True)
    rest = finish._replace(cos=finish.cos[:, 3:], sin=finish.sin[:, 3:])
    later = compress(rows[:, 8:], bias, rest, True, has_previous=True)
    torch.testing.assert_close(later, whole[:, 3:])


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("overlap", [False, True])
def test_documents_in_a_row_are_compressed_separately(backend, overlap):
    m, c = 3, 8
    w = 2 * c if overlap else c
    # Two documents of 7 and 3 tokens without anything between them; one of 4 tokens after one without a block.
    first, starts = torch.tensor([[0, 3, 7], [2, -1, -1]]), torch.tensor([[True, False, True], [True, False, False]])
    rows, bias, finish = torch.randn(2, 10, 2 * w), torch.randn(m, w), finish_of(3, c, 2, batch=2)
    found = compress(rows, bias, finish, overlap, blocks=DocumentBlocks(first, starts), backend=backend)
    for row, begin, tokens, at in ((0, 0, 6, slice(0, 2)), (0, 7, 3, slice(2, 3)), (1, 2, 3, slice(0, 1))):
        own = finish._replace(cos=finish.cos[row, None, at], sin=finish.sin[row, None, at])
        alone = compress(rows[row, None, begin : begin + tokens], bias, own, overlap, backend=backend)
        torch.testing.assert_close(found[row, None, at], alone)
    assert not found[1, 1:].any()


@needs_native
@pytest.mark.parametrize(("overlap", "has_previous"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("m", "c"), [(1, 2), (4, 6), (16, 33)])
@torch.no_grad()
def test_cpu_equals_the_reference(m, c, overlap, has_previous):
    width = 2 * c if overlap else c
    rows, bias = torch.randn(2, 5 * m, 2 * width) * 3, torch.randn(m, width)
    finish = finish_of(5 - has_previous, c, c // 2)
    found, expected = (compress(rows, bias, finish, overlap, has_previous, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_native
def test_cpu_propagates_nan_and_refuses_packed_documents():
    rows, bias, finish = torch.randn(1, 3, 64), torch.zeros(3, 32), finish_of(1, 32)
    rows[0, 1, 5] = float("nan")
    assert compress(rows, bias, finish, False, backend="cpu").isnan().any()
    blocks = DocumentBlocks(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="the cpu backend does not support packed documents"):
        compress(rows, bias, finish, False, blocks=blocks, backend="cpu")


def ring_of(rows, lengths, capacity):
    """Return a ring buffer [B, capacity, width] with the rows of the newest tokens, and noise in unused places."""
    ring = torch.randn(len(rows), capacity, rows.shape[2])
    for own, kept, length in zip(rows, ring, lengths):
        for p in range(max(0, length - capacity), length):
            kept[p % capacity] = own[p]
    return ring


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("m", [2, 4, 7])
@pytest.mark.parametrize("new", [1, 2, 9, 30])
@torch.no_grad()
def test_completed_blocks_of_a_ragged_batch(backend, overlap, m, new):
    """The pages receive the entries of whole sequences, at every offset in a block, and nothing else."""
    c, lengths = 6, [0, 1, m - 1, m, m + 1, 2 * m - 1, 2 * m, 5 * m + 2]
    width, layout = 2 * c if overlap else c, EntryLayout(c, "fp32")
    rows, bias = torch.randn(len(lengths), max(lengths) + new, 2 * width) * 3, torch.randn(m, width)
    added = torch.stack([own[length : length + new] for own, length in zip(rows, lengths)])
    ring = ring_of(rows, lengths, (2 * m - 1 if overlap else m - 1) + 2)
    counts = [(length // m, (length + new) // m) for length in lengths]
    n, most = -(-new // m), counts[-1][1]
    every = finish_of(most + n, c, 2)
    at = torch.tensor([[first + i for i in range(n)] for first, _ in counts])
    finish = every._replace(cos=every.cos[0, at], sin=every.sin[0, at])
    page_table = torch.randperm(len(lengths) * most).view(len(lengths), most)
    pages = Pages(torch.full((page_table.numel() * 2, layout.nbytes), 0xA5, dtype=torch.uint8), 2, page_table)
    compress_next(ring, added, bias, finish, torch.tensor(lengths), overlap, layout, pages, backend=backend)
    for sequence, (first, last) in enumerate(counts):
        stored = pages.storage.view(-1, 2, layout.nbytes)[page_table[sequence]].flatten(0, 1)
        if last:
            own = every._replace(cos=every.cos[:, :last], sin=every.sin[:, :last])
            whole = compress(rows[sequence, None, : last * m], bias, own, overlap, backend="reference")[0]
            torch.testing.assert_close(unpack(stored[first:last], layout), whole[first:], rtol=1e-5, atol=1e-5)
        assert (stored[:first] == 0xA5).all() and (stored[last:] == 0xA5).all()


@pytest.mark.parametrize(
    ("ring", "rows", "overlap", "message"),
    [
        (torch.zeros(1, 2, 4), 4, False, r"ring must have the shape \[1, at least 3, 4\], found \[1, 2, 4\]"),
        (torch.zeros(1, 6, 4), 4, True, r"ring must have the shape \[1, at least 7, 4\], found \[1, 6, 4\]"),
        (torch.zeros(2, 3, 4), 4, False, r"ring must have the shape .*, found \[2, 3, 4\]"),
        (torch.zeros(1, 3, 6), 4, False, r"ring must have the shape .*, found \[1, 3, 6\]"),
        (torch.zeros(3, 4), 4, False, r"ring must have the shape .*, found \[3, 4\]"),
        (
            torch.zeros(1, 4, 3).mT,
            4,
            False,
            r"ring must be contiguous float32, found float32 with strides \[12, 1, 3\]",
        ),
        (torch.zeros(1, 3, 4).bfloat16(), 4, False, "ring must be contiguous float32, found bfloat16 with strides"),
        (torch.zeros(1, 3, 4), 6, False, r"rows must have the shape \[1, tokens, 4\], found \[1, 1, 6\]"),
    ],
)
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_rings_that_do_not_match_are_refused(backend, ring, rows, overlap, message):
    arguments = torch.zeros(1, 1, rows), torch.zeros(4, 2), finish_of(1, 2 - overlap), torch.tensor([3]), overlap
    with pytest.raises(ValueError, match=f"^compress_next: {message}"):
        compress_next(ring, *arguments, EntryLayout(2 - overlap, "fp32"), None, backend=backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_a_previous_block_of_packed_documents_is_refused(backend):
    blocks = DocumentBlocks(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool))
    arguments = torch.zeros(1, 3, 64), torch.zeros(3, 32), finish_of(1, 16), True, True, blocks
    with pytest.raises(ValueError, match=r"^compress: has_previous and blocks are mutually exclusive$"):
        compress(*arguments, backend=backend)
