"""Native CPU operators against the readable twins, forward and backward, and where there are none."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import (
    cache_io,
    compress,
    expert_dispatch,
    hyper_connections,
    linear,
    native,
    projection,
    quantize,
    rms_norm,
    rotary,
    swiglu,
)
from kernels.cache_io import EntryLayout
from kernels.native import build, levels

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(native.level() is None, reason="no native operators on this machine")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 64, 8), (3, 33, 7), (8, 5, 1), (1, 1, 3)])
def test_linear(tokens, inputs, outputs, stored):
    x, weight = torch.randn(1, tokens, inputs), torch.randn(outputs, inputs).to(stored)
    assert linear.backend_for(x, weight) == "cpu"
    torch.testing.assert_close(linear.linear(x, weight), x @ weight.float().t(), rtol=1e-5, atol=1e-5)
    stack = torch.randn(3, outputs, inputs).to(stored)
    both = linear.linear_concat(x, [weight, stack[0]], backend="cpu")
    expected = torch.cat([x @ w.float().t() for w in (weight, stack[0])], dim=-1)
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)
    rows = torch.randn(1, tokens, 3, inputs)
    expected = torch.einsum("btgi,goi->btgo", rows, stack.float()).flatten(2)
    assert linear.backend_for(rows.flatten(2), stack) == "cpu"
    torch.testing.assert_close(linear.grouped_linear(rows.flatten(2), stack), expected, rtol=1e-5, atol=1e-5)


def test_many_tokens_gradients_and_strided_weights_are_left_to_the_library():
    weight = torch.randn(6, 4)
    assert linear.backend_for(torch.randn(1, 9, 4), weight) == "reference"
    assert linear.backend_for(torch.randn(1, 1, 4), torch.randn(4, 6).t()) == "reference"
    with torch.enable_grad():
        assert linear.backend_for(torch.randn(1, 1, 4), weight) == "reference"


@pytest.mark.parametrize("size", [1, 7, 64, 513])
def test_rms_norm_and_swiglu(size):
    x, up, weight = torch.randn(2, 3, size) * 9, torch.randn(2, 3, size) * 9, torch.randn(size)
    for given in (None, weight):
        found, expected = (rms_norm.rms_normalize(x, 1e-3, given, backend=b) for b in ("cpu", "reference"))
        torch.testing.assert_close(found, expected, **CLOSE)
    found, expected = (swiglu.swiglu(x, up, 10.0, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 12), (1, 3, 4, 8), (2, 1, 3, 20)])
def test_rotation(shape, inverse):
    positions = torch.randint(0, 1 << 20, shape[:2])
    frequencies = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    for found, expected in zip(rotary.angles(positions, frequencies), rotary.reference.angles(positions, frequencies)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    for some in (positions, positions[:1]):
        cos, sin = rotary.angles(some, frequencies)
        x = torch.randn(shape)
        found, expected = (rotary.rotate(x, cos, sin, inverse, backend=b) for b in ("cpu", "reference"))
        torch.testing.assert_close(found, expected, **CLOSE)


# --- formats: to the bit

LAYOUTS = [
    EntryLayout(112, "fp8", 16, "bf16"),
    EntryLayout(70, "fp8", 6, "fp32"),
    EntryLayout(40, "fp4", 8, "bf16"),
    EntryLayout(24, "bf16", 8, "bf16"),
    EntryLayout(24, "fp32", 8, "fp32"),
    EntryLayout(16, "fp4"),
    EntryLayout(128, "fp4"),
    EntryLayout(96, "fp8"),
]


def values(*shape):
    """Of all magnitudes, zeros of both signs and values on the borders of a rounding among them."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-140, 120, (*shape[:-1], 1)).float())
    grid = torch.tensor([0.0, -0.0, 0.25, 0.75, 1.25, 2.5, 3.5, 5.0, 447.9, 432.0, 0.0009765625, 1e-40])
    flat = x.view(-1, shape[-1])
    flat[::3] = grid[torch.randint(0, len(grid), flat[::3].shape)] * torch.randint(-1, 2, flat[::3].shape)
    return x


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.body_format}-{layout.size}")
def test_packing_and_rounding_have_the_readable_bits(layout):
    for _ in range(4):
        x = values(31, 5, layout.size)
        packed = cache_io.pack(x, layout, backend="cpu")
        assert torch.equal(packed, cache_io.pack(x, layout, backend="reference"))
        unpacked = cache_io.unpack(packed, layout, backend="reference")
        assert torch.equal(cache_io.unpack(packed, layout, backend="cpu").view(torch.int32), unpacked.view(torch.int32))
        rounded = quantize.round_to_layout(x, layout)
        assert torch.equal(rounded, unpacked)
        body = x[..., : layout.body]
        for dtype in (torch.float32, torch.bfloat16):
            found, expected = (
                quantize.round_to_format(body, layout.body_format, dtype, backend=b) for b in ("cpu", "reference")
            )
            assert torch.equal(found, expected)


def test_every_code_is_unpacked_right():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # NaN
    layout = EntryLayout(len(codes), "fp8")
    scales = torch.randint(1, 254, (3, layout.scales), dtype=torch.uint8)
    padding = torch.zeros(3, layout.nbytes - len(codes) - layout.scales, dtype=torch.uint8)
    rows = torch.cat((codes.expand(3, -1), scales, padding), dim=1)
    assert torch.equal(cache_io.unpack(rows, layout, "cpu"), cache_io.unpack(rows, layout, "reference"))


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_hadamard(size):
    x = torch.randn(3, 4, size)
    torch.testing.assert_close(quantize.hadamard(x), quantize.reference.hadamard(x), **CLOSE)
    with pytest.raises(ValueError, match="power of two, found 12"):
        quantize.hadamard(torch.randn(2, 12))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_rings_are_written_around_their_end(dtype):
    rings = [torch.zeros(3, 5, 4, dtype=dtype) for _ in range(2)]
    for count, ends in ((2, [2, 6, 11]), (5, [9, 5, 20]), (1, [10, 10, 10]), (0, [3, 3, 3])):
        rows = torch.randint(0, 200, (3, count, 4)).to(dtype)
        cache_io.write_ring(rings[0], rows, ends, backend="cpu")
        cache_io.write_ring(rings[1], rows, ends, backend="reference")
        assert torch.equal(*rings)


# --- pooling, experts


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("has_previous", [False, True])
@pytest.mark.parametrize(("m", "c"), [(1, 1), (4, 6), (16, 33)])
def test_compress(m, c, overlap, has_previous):
    if has_previous and not overlap:
        return
    width = 2 * c if overlap else c
    rows, bias = torch.randn(2, 5 * m, 2 * width) * 3, torch.randn(m, width)
    found, expected = (compress.compress(rows, bias, overlap, has_previous, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_routes(tokens):
    logits, bias = torch.randn(2, tokens, 8) * 4, torch.randn(8)
    for fixed in (None, torch.randint(0, 8, (2, tokens, 3))):
        found, expected = (expert_dispatch.route(logits, bias, 3, 1.5, fixed, backend=b) for b in ("cpu", "reference"))
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], **CLOSE)
    assert expert_dispatch.route(torch.zeros(1, 6), torch.zeros(6), 2, 1.0)[0].tolist() == [[0, 1]]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inner", "width"), [(8, 12), (5, 7), (33, 32)])
def test_few_tokens_of_experts(inner, width, stored):
    w1, w3, w2 = (torch.randn(s).to(stored) for s in ((4, inner, width), (4, inner, width), (4, width, inner)))
    x, chosen, weights = torch.randn(5, width), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    stacks = w1, w3, w2
    for shared in ((), tuple(w[0].clone() for w in stacks)):
        found = expert_dispatch.few_tokens(x, chosen, weights, stacks, shared, 10.0)
        expected = expert_dispatch.reference.few_tokens(x, chosen, weights, stacks, shared, 10.0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(IndexError, match="expert 4 of 4"):
        expert_dispatch.few_tokens(x, torch.full((5, 2), 4), weights, stacks, (), 10.0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 3)])
def test_projections(batch, tokens, stored):
    hidden, rank, heads, c = 24, 12, 4, 16
    shapes = {"wq_a": (rank, hidden), "wq_b": (heads * c, rank), "wkv": (c, hidden), "wo_a": (2, 8, 2 * c)}
    shapes |= {"wo_b": (hidden, 16), "index": (4 * 8, rank)}
    weight = {name: torch.randn(shape).to(stored) for name, shape in shapes.items()}
    exact = {name: w.float() for name, w in weight.items()}
    x, norm, kv_norm = torch.randn(batch, tokens, hidden), torch.randn(rank), torch.randn(c)
    mixed, layout = torch.randn(batch, tokens, heads, c), EntryLayout(8, "fp32", 8, "fp32")
    positions = torch.randint(0, 5000, (batch, tokens))
    assert projection.backend_for(x, weight["wkv"]) == "cpu"
    for some in (positions, positions[:1]):
        cos, sin = rotary.angles(some, 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4))
        found, expected = (
            (
                *projection.latent_query(x, w["wq_a"], norm, w["wq_b"], cos, sin, heads, 1e-6, backend=b),
                projection.grouped_output(mixed, cos, sin, w["wo_a"], w["wo_b"], backend=b),
                projection.index_query(x[..., :rank], w["index"], cos, sin, 4, backend=b),
                cache_io.unpack(projection.packed_key_value(x, w["wkv"], kv_norm, cos, sin, 1e-6, layout, b), layout),
            )
            for b, w in (("cpu", weight), ("reference", exact))
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- hyper-connections, with gradients


def gradients(backend, inputs, iterations, output_dtype):
    streams, fn, scale, base, output = (x.clone().requires_grad_() for x in inputs)
    x, post, comb, handed = hyper_connections.enter(streams, fn, scale, base, iterations, 1e-6, 1e-6, backend)
    out = hyper_connections.expand(handed, comb, post, output.to(output_dtype) + x.to(output_dtype), backend)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    grads = torch.autograd.grad((out * probe).sum(), (streams, fn, scale, base, output))
    return (x, post, comb, out, *grads)


@pytest.mark.parametrize("output_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "n", "d"), [(1, 4, 8), (17, 4, 33), (40, 4, 300), (9, 2, 16), (20, 3, 5)])
def test_hyper_connections(tokens, n, d, output_dtype):
    weights = 2 * n + n * n
    inputs = [torch.randn(s) for s in ((2, tokens, n, d), (weights, n * d), (3,), (weights,), (2, tokens, d))]
    inputs[1] /= (n * d) ** 0.5
    with torch.enable_grad():
        found, expected = (gradients(b, inputs, 20, output_dtype) for b in ("cpu", "reference"))
    for name, a, b in zip(("x", "post", "comb", "out", "streams", "fn", "scale", "base", "output"), found, expected):
        bound = (2e-2 if output_dtype == torch.bfloat16 else 2e-4) * float(b.abs().max()) + 1e-6
        assert (a - b).abs().max() <= bound, (name, (a - b).abs().max(), bound)
    quiet = hyper_connections.enter(*inputs[:4], 20, 1e-6, 1e-6, "cpu")
    torch.testing.assert_close(quiet[0], found[0], rtol=1e-4, atol=1e-5)
    base, scale = torch.randn(n), torch.randn(1)
    arguments = inputs[0], inputs[1][:n], scale, base, 1e-6, 1e-6
    found, expected = (hyper_connections.head(*arguments, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_nan_is_not_swallowed():
    x = torch.randn(1, 3, 64)
    x[0, 1, 5] = float("nan")
    assert swiglu.swiglu(x, torch.ones(1, 3, 64), 10.0, backend="cpu")[0, 1, 5].isnan()
    assert swiglu.swiglu(torch.ones(1, 3, 64), x, 10.0, backend="cpu")[0, 1, 5].isnan()
    assert quantize.round_to_format(x, "fp8", backend="cpu")[0, 1, 5].isnan()
    assert compress.compress(x[..., :64].expand(1, 3, 64), torch.zeros(3, 32), False, backend="cpu").isnan().any()
    streams, fn = torch.randn(1, 2, 4, 8), torch.randn(24, 32)
    streams[0, 0, 0, 0] = float("nan")
    entered = hyper_connections.enter(streams, fn, torch.ones(3), torch.zeros(24), 20, 1e-6, 1e-6, "cpu")
    assert all(part[0, 0].isnan().any() and not part[0, 1].isnan().any() for part in entered[:3])


def test_what_does_not_fit_is_refused():
    logits = torch.randn(2, 4)
    with pytest.raises(IndexError, match="expert 4 of 4"):
        expert_dispatch.route(logits, torch.zeros(4), 1, 1.0, torch.tensor([[0], [4]]), backend="cpu")
    with pytest.raises(ValueError, match="fn of the head has 9 rows"):
        hyper_connections.head(
            torch.randn(1, 1, 4, 8), torch.randn(9, 32), torch.ones(1), torch.zeros(9), 1e-6, 1e-6, backend="cpu"
        )
    with pytest.raises(ValueError, match="2 rows cannot end at position 1"):
        cache_io.write_ring(torch.zeros(1, 4, 2), torch.zeros(1, 2, 2), [1], backend="cpu")


# --- the library


def run(code, **environment):
    settings = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=120)


DECODE = """
import torch
from kernels import native
from model.cache import Cache
from model.config import ModelConfig
from model.transformer import Transformer
torch.manual_seed(0)
formats = {"kv_format": "fp32", "rope_format": "fp32", "index_format": "fp32", "qat": False}
model = Transformer(ModelConfig.from_preset("tiny", zero_init_output=False, **formats)).eval()
ids = torch.randint(0, 250, (1, 90))
whole = model(ids).detach()
cache = Cache(model.config, 1, 100)
with torch.inference_mode():
    pieces = [model(ids[:, :40], cache)] + [model(ids[:, i : i + 1], cache) for i in range(40, 90)]
assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-4
print(native.level())
"""


@pytest.mark.parametrize("name", ["avx2", "default"])
def test_lower_instruction_sets_compute_the_same(name):
    """PyTorch's own limit lowers ours; without AVX2 PyTorch's operators run, and one line says so."""
    found = run(DECODE, ATEN_CPU_CAPABILITY=name)
    assert found.returncode == 0, found.stderr
    expected = "avx2" if name == "avx2" and "avx2" in levels.supported_levels() else "None"
    assert found.stdout.strip() == expected
    assert found.stderr.count("native CPU operators") == (expected == "None")


def test_without_a_library_one_line_says_so_and_the_results_are_right(tmp_path):
    found = run(DECODE, XDG_CACHE_HOME=str(tmp_path))
    assert found.returncode == 0 and found.stdout.strip() == "None", found.stderr
    assert "not built for these sources" in found.stderr and "make native" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("fault", ["damaged", "no library", "no digest"])
def test_a_cache_that_cannot_be_trusted_is_left_alone(fault, tmp_path, monkeypatch, caplog):
    path = tmp_path / "x.so"
    path.write_bytes(b"not a library")
    if fault != "no digest":
        path.with_name("x.so.sha256").write_text("0" * 64)
    if fault == "no library":
        monkeypatch.setattr(native.hashlib, "sha256", lambda data: type("", (), {"hexdigest": lambda self: "0" * 64})())
    monkeypatch.setattr(native, "supported_levels", lambda: ["some"])
    monkeypatch.setattr(native, "library_path", lambda level: path)
    with caplog.at_level(logging.WARNING, logger="fiftyfold"):
        assert native.level.__wrapped__() is None
    (record,) = caplog.records
    assert {"damaged": "is damaged"}.get(fault, "cannot be loaded") in record.message


def test_no_compiler_and_one_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.main() == 0
    assert "no C++ compiler found" in (said := capsys.readouterr().err) and "make native" in said
    monkeypatch.setenv("CXX", "false")
    assert build.main() == 0
    assert "false ended with status 1" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.so"))
