import pytest
import torch
from backend_testing import needs_native

from kernels.cache_io import EntryLayout, Pages, pack, unpack, write_pages, write_ring
from kernels.cache_io.layout import FORMAT_BITS
from kernels.quantize import round_to_format, round_to_layout

LAYOUTS = [
    EntryLayout(112, "fp8", 16, "bf16"),
    EntryLayout(70, "fp8", 6, "fp32"),
    EntryLayout(40, "fp4", 8, "bf16"),
    EntryLayout(24, "bf16", 8, "bf16"),
    EntryLayout(24, "fp32", 8, "fp32"),
    EntryLayout(16, "fp4"),
    EntryLayout(128, "fp4"),
    EntryLayout(96, "fp8"),
    EntryLayout(320, "fp8_128", 16, "bf16"),
    EntryLayout(70, "fp8_128", 5, "bf16"),
    EntryLayout(150, "fp8_128"),
]


def values(*shape):
    """Return values of all magnitudes, including signed zeros and ties of the rounding."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-140, 120, (*shape[:-1], 1)).float())
    grid = torch.tensor([0.0, -0.0, 0.25, 0.75, 1.25, 2.5, 3.5, 5.0, 447.9, 432.0, 0.0009765625, 1e-40])
    flat = x.view(-1, shape[-1])
    flat[::3] = grid[torch.randint(0, len(grid), flat[::3].shape)] * torch.randint(-1, 2, flat[::3].shape)
    return x


@pytest.mark.parametrize("body", FORMAT_BITS)
@pytest.mark.parametrize("size", [16, 32, 48, 96, 128, 448])
def test_rounding_in_training_equals_a_round_trip_through_the_cache(body, size):
    x = torch.randn(3, 5, size + 16) * torch.logspace(-3, 2, 5).view(1, 5, 1)
    layout = EntryLayout(size, body, 16, "bf16")
    packed = pack(x, layout)
    assert packed.shape == (3, 5, layout.nbytes) and packed.dtype == torch.uint8
    expected = torch.cat((round_to_format(x[..., :size], body), round_to_format(x[..., size:], "bf16")), -1)
    assert torch.equal(unpack(packed, layout), expected)
    assert torch.equal(unpack(pack(expected, layout), layout), expected)  # packing is idempotent


def test_entries_have_the_released_sizes():
    assert EntryLayout(448, "fp8", 64, "bf16").nbytes == 584
    assert EntryLayout(128, "fp4").nbytes == 68
    assert EntryLayout(512, "fp8_128", 64, "bf16").nbytes == 656
    assert EntryLayout(128, "fp8_128").nbytes == 132


def test_wide_blocks_store_their_scale_in_float32():
    layout = EntryLayout(256, "fp8_128", 2, "bf16")
    x = torch.randn(3, 258) * torch.tensor([[1.0], [1e-3], [1e3]])
    rows = pack(x, layout, backend="reference")
    scales = rows[:, 260:268].contiguous().view(torch.float32)
    grid = rows[:, :256].contiguous().view(torch.float8_e4m3fn).float()
    assert torch.equal(scales, scales.log2().round().exp2())
    amax = x[:, :256].unflatten(1, (2, 128)).abs().amax(-1)
    assert ((amax / scales <= 448) & (amax / scales > 224)).all()
    values = unpack(rows, layout, backend="reference")[:, :256]
    assert torch.equal(grid.unflatten(1, (2, 128)) * scales.unsqueeze(-1), values.unflatten(1, (2, 128)))
    assert ((values - x[:, :256]).abs() <= x[:, :256].abs() / 16 + scales.repeat_interleave(128, 1) / 1024).all()


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.body_format}-{layout.size}")
@torch.no_grad()
def test_cpu_equals_the_reference_bit_for_bit(layout):
    for _ in range(4):
        x = values(31, 5, layout.size)
        packed = pack(x, layout, backend="cpu")
        assert torch.equal(packed, pack(x, layout, backend="reference"))
        found, expected = (unpack(packed, layout, backend=b) for b in ("cpu", "reference"))
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
        assert torch.equal(round_to_layout(x, layout), expected)
        body = x[..., : layout.body]
        for dtype in (torch.float32, torch.bfloat16):
            found, expected = (round_to_format(body, layout.body_format, dtype, b) for b in ("cpu", "reference"))
            assert torch.equal(found, expected)


@needs_native
def test_cpu_unpacks_every_fp8_code():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # NaN
    layout = EntryLayout(len(codes), "fp8")
    scales = torch.randint(1, 254, (3, layout.scales), dtype=torch.uint8)
    padding = torch.zeros(3, layout.nbytes - len(codes) - layout.scales, dtype=torch.uint8)
    rows = torch.cat((codes.expand(3, -1), scales, padding), dim=1)
    assert torch.equal(unpack(rows, layout, "cpu"), unpack(rows, layout, "reference"))


@needs_native
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@torch.no_grad()
def test_rings_wrap_around(dtype):
    rings = [torch.zeros(3, 5, 4, dtype=dtype) for _ in range(2)]
    for count, first in ((2, [0, 4, 9]), (5, [4, 0, 15]), (1, [9]), (0, [3, 3, 3])):
        rows = torch.randint(0, 200, (3, count, 4)).to(dtype)
        write_ring(rings[0], rows, torch.tensor(first), backend="cpu")
        write_ring(rings[1], rows, torch.tensor(first), backend="reference")
        assert torch.equal(*rings)
    with pytest.raises(ValueError, match="rows cannot begin at position -1"):
        write_ring(torch.zeros(1, 4, 2), torch.zeros(1, 2, 2), torch.tensor([-1]), backend="cpu")


@pytest.mark.parametrize("pages", [[1, 2, 3], [4, 0, 2]])
def test_rows_are_read_from_pages(pages):
    storage = torch.arange(5 * 4 * 2, dtype=torch.uint8).view(20, 2)
    expected = torch.cat([storage[4 * page : 4 * page + 4] for page in pages])
    batch = Pages(storage, 4, torch.tensor([[0, 1, 2], pages]))
    indices = torch.tensor([[0, 7, 2], [11, 4, 4]])
    assert torch.equal(batch.gather(indices)[1], expected[indices[1]])
    assert torch.equal(batch.gather_from(torch.tensor([1]), indices[1:]), expected[indices[1:]])
    found = batch.gather_range(2, 7, torch.tensor([0, 5]))  # rows past the fifth repeat it
    assert torch.equal(found[1], expected[[2, 3, 4, 4, 4]]) and torch.equal(found[0], storage[[0] * 5])


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_new_entries_are_packed_into_pages(backend, layout):
    x, size = values(3, 4, layout.size), 3
    pages = Pages(
        torch.full((7 * size, layout.nbytes), 9, dtype=torch.uint8), size, torch.tensor([[4, 0], [2, 6], [5, 5]])
    )
    expected = pages.storage.clone()
    packed = pack(x, layout, backend="reference")
    for sequence, first, last in ((0, 1, 5), (1, 2, 4), (2, 2, 2)):
        for i in range(first, last):
            expected[int(pages.page_table[sequence, i // size]) * size + i % size] = packed[sequence, i - first]
    write_pages(x, layout, pages, torch.tensor([1, 2, 2]), torch.tensor([5, 4, 2]), backend=backend)
    assert torch.equal(pages.storage, expected)


@needs_native
def test_entries_that_do_not_fit_their_pages_are_refused():
    layout = EntryLayout(4, "fp32")
    pages = Pages(torch.zeros(4, layout.nbytes, dtype=torch.uint8), 2, torch.tensor([[0, 9]]))
    for first, last, error, message in (
        (0, 3, ValueError, "do not fit 2 entries and 2 pages"),
        (3, 5, ValueError, "do not fit 2 entries and 2 pages"),
        (2, 3, IndexError, "page 9 does not exist"),
    ):
        with pytest.raises(error, match=message):
            write_pages(torch.zeros(1, 2, 4), layout, pages, *torch.tensor([[first], [last]]), backend="cpu")
