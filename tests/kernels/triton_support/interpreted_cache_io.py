"""Run by test_interpreted.py with TRITON_INTERPRET=1."""

import pytest
import torch

from kernels.cache_io import EntryLayout, Pages, pack, unpack, write_pages
from kernels.quantize import fake_quantize, round_to_format, round_to_layout
from tests.kernels.backend_testing import E2M1_VALUES

LAYOUTS = [
    EntryLayout(448, "fp8", 64),
    EntryLayout(128, "fp4"),
    EntryLayout(256, "fp8_128", 16),
    EntryLayout(24, "fp8", 8, "fp32"),
    EntryLayout(70, "bf16", 10),
    EntryLayout(18, "fp32", 6, "fp32"),
    EntryLayout(90, "fp8_128", 6),
    EntryLayout(80, "fp4", 8),
    EntryLayout(100, "fp8"),
]


def borders(grid, size):
    """Return values on and next to the borders between neighbors of a grid, both signs, padded to rows."""
    middles = (grid[1:] + grid[:-1]) / 2
    values = torch.cat((grid, middles, middles.nextafter(middles * 2), middles.nextafter(middles * 0)))
    return values


def hard_rows(size):
    """Return rows whose blocks have extreme magnitudes, and values on rounding borders of every format."""
    e4m3 = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    e2m1 = torch.tensor(E2M1_VALUES)
    bf16 = torch.tensor([1.0, 1.0078125, 3.140625, 3.15625])
    border = torch.cat([borders(grid, size) for grid in (e4m3, e2m1, bf16)])
    border = torch.cat((border, -border, border * 2.0**-9, -border * 2.0**7))
    rows = [border[torch.randint(len(border), (6, size))]]
    # Magnitudes on the borders between scales.
    for top in (448.0, 6.0, 448.0 * 2.0**-10, 6.0 * 2.0**5):
        edge = torch.tensor(top)
        for amax in (edge, edge.nextafter(edge * 2), edge.nextafter(edge * 0)):
            row = torch.randn(1, size).clamp(-1, 1) * top / 3
            row[:, :: min(16, size)] = amax
            rows.append(row)
    rows += [torch.zeros(1, size), -torch.zeros(1, size), torch.full((1, size), 1e-30), torch.full((1, size), 1e-42)]
    special = torch.randn(2, size)
    special[0, 0], special[1, 1] = float("inf"), float("-inf")
    return torch.cat([*rows, special, torch.full((1, size), 3e38), torch.randn(3, size) * 100])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packing_and_unpacking_have_the_bits_of_the_reference(layout):
    x = hard_rows(layout.size)
    packed = pack(x, layout, backend="reference")
    assert torch.equal(pack(x, layout, backend="triton"), packed)
    finite = packed[~torch.isinf(x).any(-1)]
    expected = unpack(finite, layout, backend="reference")
    assert torch.equal(unpack(finite, layout, backend="triton").view(torch.int32), expected.view(torch.int32))


def test_pages_have_the_bits_of_the_reference():
    layout, x, size = EntryLayout(448, "fp8", 64), torch.randn(3, 4, 512), 3
    stored = []
    for backend in ("triton", "reference"):
        storage = torch.full((7 * size, layout.nbytes), 9, dtype=torch.uint8)
        pages = Pages(storage, size, torch.tensor([[4, 0], [2, 6], [5, 5]]))
        write_pages(x, layout, pages, torch.tensor([1, 2, 2]), torch.tensor([5, 4, 2]), backend=backend)
        stored.append(storage)
    assert torch.equal(*stored) and (stored[0] != 9).any()


def test_every_e4m3_and_e2m1_code_unpacks_to_its_value():
    layout = EntryLayout(256, "fp8")
    packed = torch.zeros(1, layout.nbytes, dtype=torch.uint8)
    packed[0, :256] = torch.arange(256).masked_fill(torch.arange(256) % 128 == 127, 0)
    packed[0, layout.scale_offset :][: layout.scales] = torch.tensor([127, 0, 254, 1], dtype=torch.uint8)
    assert torch.equal(unpack(packed, layout, backend="triton"), unpack(packed, layout, backend="reference"))
    layout = EntryLayout(32, "fp4")
    packed = torch.full((256, layout.nbytes), 120, dtype=torch.uint8)
    packed[:, :16] = torch.arange(256).unsqueeze(-1)
    assert torch.equal(unpack(packed, layout, backend="triton"), unpack(packed, layout, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fmt", "size"), [("fp8", 100), ("fp8_128", 130), ("fp4", 33), ("fp4", 7)])
def test_rounding_has_the_bits_of_the_reference(fmt, size, dtype):
    x = hard_rows(size)
    x[-1, 0] = float("nan")
    expected = round_to_format(x, fmt, dtype, backend="reference")
    found = round_to_format(x, fmt, dtype, backend="triton")
    assert torch.equal(found.isnan(), expected.isnan())
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    known = ~expected.isnan()
    assert torch.equal(found[known].view(bits), expected[known].view(bits))


def test_rounding_to_a_layout_has_the_bits_of_a_round_trip():
    layout, x = EntryLayout(448, "fp8", 64), torch.randn(5, 512)
    expected = unpack(pack(x, layout, backend="triton"), layout, backend="triton")
    assert torch.equal(round_to_layout(x, layout, backend="triton"), expected)


def test_gradients_pass_straight_through():
    x = torch.randn(3, 64, requires_grad=True)
    fake_quantize(x, "fp8", backend="triton").sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 64))


def test_empty_inputs():
    layout = EntryLayout(64, "fp8")
    assert pack(torch.zeros(2, 0, 64), layout, backend="triton").shape == (2, 0, layout.nbytes)
    assert unpack(torch.zeros(0, layout.nbytes, dtype=torch.uint8), layout, backend="triton").shape == (0, 64)


def test_unsupported_inputs_are_refused_with_the_supported_set():
    with pytest.raises(ValueError, match=r"supports dtypes of results float32, bfloat16; found float16$"):
        round_to_format(torch.zeros(64), "fp8", torch.float16, backend="triton")
    with pytest.raises(ValueError, match=r"supports dtypes float32, bfloat16, float16; found float64$"):
        pack(torch.zeros(1, 64, dtype=torch.float64), EntryLayout(64, "fp8"), backend="triton")
