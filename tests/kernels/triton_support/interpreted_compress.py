"""Run by test_interpreted.py with TRITON_INTERPRET=1."""

import pytest
import torch

from kernels.cache_io import EntryLayout, Pages, pack
from kernels.compress import DocumentBlocks, Finish, compress, compress_next
from kernels.compress import triton as backend
from kernels.quantize import round_to_layout


def finish_of(batch, n, c, r, hadamard=False):
    angles = torch.rand(batch, n, r) * 6
    return Finish(torch.rand(c) + 0.5, 1e-3, angles.cos(), angles.sin(), hadamard)


def run(backend, rows, bias, finish, *options, dtype=torch.float32):
    rows, bias, weight = leaves = [x.detach().to(dtype).requires_grad_() for x in (rows, bias, finish.norm_weight)]
    out = compress(rows, bias, finish._replace(norm_weight=weight), *options, backend=backend)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))


@pytest.fixture(params=[True, False], ids=["fused", "in chunks"])
def fused(request, monkeypatch):
    monkeypatch.setattr(backend, "MAX_FUSED", 4096 if request.param else 0)


SHAPES = [
    # m, blocks, c, rotated pairs, overlap, has_previous, hadamard, batch of angles
    (4, 7, 20, 4, True, False, False, 2),
    (4, 3, 32, 16, True, True, True, 1),
    (3, 1, 16, 3, True, False, True, 1),
    (3, 5, 18, 9, False, False, False, 1),
    (5, 2, 34, 5, False, False, False, 2),
]


@pytest.mark.parametrize(("m", "blocks", "c", "r", "overlap", "has_previous", "hadamard", "angles"), SHAPES)
@pytest.mark.usefixtures("fused")
def test_entries_and_gradients_equal_those_of_float64(
    m, blocks, c, r, overlap, has_previous, hadamard, angles, monkeypatch
):
    w = 2 * c if overlap else c
    finish = finish_of(angles, blocks - has_previous, c, r, hadamard)
    given = torch.randn(2, blocks * m, 2 * w), torch.randn(m, w), finish, overlap, has_previous
    with monkeypatch.context() as patch:  # every element is written
        patch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, float("nan")))
        patch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))
        found = run("triton", *given)
    expected = run("reference", *given, dtype=torch.float64)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.usefixtures("fused")
def test_packed_documents(overlap):
    """Blocks at any offset, adjacent documents, tokens without a block, padding, and a row of padding only."""
    m, c, nothing = 4, 20, -1
    w = 2 * c if overlap else c
    first = torch.tensor([[1, 1 + m, 1 + 2 * m, 4 + 3 * m], [0, m + 2, nothing, nothing], [nothing] * 4])
    starts = torch.tensor([[True, False, True, True], [True, True, True, True], [True] * 4])
    rows = torch.randn(3, 5 * m + 1, 2 * w)
    given = rows, torch.randn(m, w), finish_of(3, 4, c, 4), overlap, False, DocumentBlocks(first, starts)
    expected = run("reference", *given, dtype=torch.float64)
    rows[2] = float("nan")
    found = run("triton", *given)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-5)
    assert not found[0][first < 0].any() and not found[1][2].any()


def test_long_blocks_are_pooled_in_chunks():
    assert backend.is_fused(4, 512) and backend.is_fused(8, 512) and not backend.is_fused(128, 512)
    assert backend.block_constants(128, 512, backend.CHUNK_TILES["sm_90"][0]) == {"M_PAD": 128, "BLOCK_C": 32}
    assert backend.block_constants(4, 512, backend.FUSED_TILES["sm_90"][0]) == {"M_PAD": 4, "BLOCK_C": 512}
    given = torch.randn(1, 600, 68), torch.randn(300, 34), finish_of(1, 2, 34, 3), False
    for x, y in zip(run("triton", *given), run("reference", *given, dtype=torch.float64), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-5)


def test_gates_far_apart_and_no_blocks():
    finish = finish_of(1, 2, 16, 2)
    given = torch.randn(1, 8, 64) * 200, torch.zeros(4, 32), finish, True
    for x, y in zip(run("triton", *given), run("reference", *given, dtype=torch.float64)):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-3)
    empty = run("triton", torch.zeros(1, 0, 64), torch.zeros(4, 32), finish_of(1, 0, 16, 2), True)
    assert empty[0].shape == (1, 0, 16) and not any(x.any() for x in empty)


LAYOUTS = [
    EntryLayout(48, "fp8", 16),
    EntryLayout(56, "fp8", 8, "fp32"),
    EntryLayout(112, "fp8", 16),  # two blocks, the second one shorter
    EntryLayout(64, "fp4"),
    EntryLayout(56, "fp4", 8),
    EntryLayout(120, "fp8_128", 8),
    EntryLayout(24, "bf16", 8, "fp32"),
    EntryLayout(32, "fp32"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.usefixtures("fused")
def test_rounded_entries_have_the_bits_of_the_reference(layout):
    m, c = 3, layout.size
    rows, bias = torch.randn(1, 3 * m, 2 * c) * torch.rand(1, 3 * m, 1).exp2(), torch.randn(m, c)
    given = rows, bias, finish_of(1, 3, c, 4), False, False, None
    exact, rounded = (run("triton", *given, fmt) for fmt in (None, layout))
    assert torch.equal(rounded[0], round_to_layout(exact[0], layout, backend="reference"))
    for x, y in zip(rounded[1:], exact[1:]):  # straight through
        assert torch.equal(x, y)


def cache_of(batch, layout, page_size, pages):
    """Return pages of bytes that no entry has, in an order of their own for every sequence."""
    storage = torch.full((batch * pages * page_size, layout.nbytes), 0xA5, dtype=torch.uint8)
    return Pages(storage, page_size, torch.randperm(batch * pages).view(batch, pages))


CASES = [
    *((layout, 4, True, 9) for layout in LAYOUTS),
    (LAYOUTS[0], 4, False, 1),
    (LAYOUTS[3], 3, True, 1),
    (LAYOUTS[4], 4, False, 2),
]


@pytest.mark.parametrize(("layout", "m", "overlap", "new"), CASES)
@pytest.mark.usefixtures("fused")
@torch.no_grad()
def test_completed_blocks_are_packed_into_pages(layout, m, overlap, new):
    """At every offset in a block, the first block and sequences that complete none included."""
    c, lengths = layout.size, [0, m - 1, m, 2 * m - 1, 3 * m + 2]
    w, tokens = 2 * c if overlap else c, max(lengths) + new
    rows, bias = torch.randn(len(lengths), tokens, 2 * w), torch.randn(m, w)
    angles = torch.rand(1, tokens // m, 3) * 6
    counts = [(length // m, (length + new) // m) for length in lengths]
    n = -(-new // m)
    at = torch.tensor([[min(first + i, tokens // m - 1) for i in range(n)] for first, _ in counts])
    finish = Finish(torch.rand(c) + 0.5, 1e-3, angles[0, at].cos(), angles[0, at].sin(), c & (c - 1) == 0)
    capacity = 2 * m + 1
    ring = torch.full((len(lengths), capacity, 2 * w), float("nan"))
    for own, kept, length in zip(rows, ring, lengths):
        for p in range(max(0, length - capacity), length):
            kept[p % capacity] = own[p]
    added = torch.stack([own[length : length + new] for own, length in zip(rows, lengths)])
    pages = cache_of(len(lengths), layout, 2, 3)
    before = pages.storage.clone()
    compress_next(ring, added, bias, finish, torch.tensor(lengths), overlap, layout, pages, backend="triton")
    written = torch.zeros(len(before), dtype=torch.bool)
    for sequence, (first, last) in enumerate(counts):
        if last > first:
            everything = finish._replace(cos=angles[:, :last].cos(), sin=angles[:, :last].sin())
            whole = compress(rows[sequence, None, : last * m], bias, everything, overlap, backend="triton")
            places = pages.page_table[sequence, torch.arange(first, last) // 2] * 2 + torch.arange(first, last) % 2
            assert torch.equal(pages.storage[places], pack(whole[0, first:], layout, backend="reference"))
            written[places] = True
    assert written.any() and torch.equal(pages.storage[~written], before[~written])


@pytest.mark.parametrize("new", [1, 3, 4])
@torch.no_grad()
def test_settings_are_not_timed_without_a_block_that_is_sure_to_be_complete(new, monkeypatch):
    m, c, found = 4, 8, []
    monkeypatch.setattr(backend, "launch_best", lambda kernel, tiles, *arguments: found.append(tiles))
    rows, finish = torch.randn(2, new, 2 * c), finish_of(1, 1, c, 4)
    pages = cache_of(2, EntryLayout(c, "fp32"), 2, 3)
    compress_next(
        torch.zeros(2, m, 2 * c), rows, torch.zeros(m, c), finish, torch.tensor([0, 1]), False, EntryLayout(c, "fp32"),
        pages, backend="triton",
    )  # fmt: skip
    (tiles,) = found
    expected = {name: choices if new >= m else choices[:1] for name, choices in backend.FUSED_TILES.items()}
    assert tiles == expected and len(backend.FUSED_TILES["sm_90"]) > 1


@pytest.mark.parametrize(
    ("tokens", "c", "dtype", "hadamard", "layout", "message"),
    [
        (4, 16, torch.bfloat16, False, None, "the triton backend supports dtypes float32; found bfloat16$"),
        (4, 15, torch.float32, False, None, "the triton backend supports even numbers of channels; found 15$"),
        (6, 16, torch.float32, False, None, "6 tokens are not a multiple of the 4 tokens per block$"),
        (4, 12, torch.float32, True, None, "the Hadamard rotation requires a power of two of channels, found 12$"),
        (4, 16, torch.float32, False, EntryLayout(8, "fp8"), "the layout has 8 dims, the entries 16$"),
        (
            8,
            16,
            torch.float32,
            False,
            None,
            r"cos and sin must have the shape \[1 or 1, 2, at most 8\], found \[1, 1, 2\]",
        ),
    ],
)
def test_unsupported_inputs_are_refused(tokens, c, dtype, hadamard, layout, message):
    rows, bias, finish = torch.zeros(1, tokens, 2 * c, dtype=dtype), torch.zeros(4, c), finish_of(1, 1, c, 2, hadamard)
    with pytest.raises(ValueError, match=f"^compress: {message}"):
        compress(rows, bias, finish, False, layout=layout, backend="triton")


@pytest.mark.parametrize(
    ("cos", "sin"),
    [((3, 2, 4), (3, 2, 4)), ((1, 1, 4), (1, 1, 4)), ((2, 2, 5), (2, 2, 5)), ((1, 2, 4), (2, 2, 4)), ((2, 4), (2, 4))],
    ids=["sequences", "entries", "pairs", "sines", "dims"],
)
@torch.no_grad()
def test_angles_of_other_entries_are_refused(cos, sin):
    m, c, layout = 4, 8, EntryLayout(8, "fp32")
    finish = Finish(torch.ones(c), 1e-6, torch.ones(cos), torch.zeros(sin))
    rows, bias = torch.zeros(2, 2 * m, 2 * c), torch.zeros(m, c)
    message = r"^compress: cos and sin must have the shape \[1 or 2, 2, at most 4\], found "
    with pytest.raises(ValueError, match=message):
        compress(rows, bias, finish, False, backend="triton")
    blocks = DocumentBlocks(torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        compress(rows, bias, finish, False, blocks=blocks, backend="triton")
    ring, pages = torch.zeros(2, m, 2 * c), cache_of(2, layout, 2, 1)
    with pytest.raises(ValueError, match=message):
        compress_next(ring, rows, bias, finish, torch.tensor([0]), False, layout, pages, backend="triton")


@torch.no_grad()
def test_no_sequences():
    finish, layout = finish_of(1, 1, 8, 2), EntryLayout(8, "fp32")
    nothing = torch.zeros(0, dtype=torch.int64)
    arguments = torch.zeros(0, 3, 16), torch.zeros(0, 4, 16), torch.zeros(4, 8), finish, nothing, False, layout
    compress_next(*arguments, cache_of(1, layout, 2, 1), backend="triton")
