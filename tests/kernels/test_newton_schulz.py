import pytest
import torch

from kernels import native
from kernels.hardware import multiplies_bf16_fast
from kernels.newton_schulz import V4_COEFFICIENTS, backend_for, cpu, eager, newton_schulz
from kernels.newton_schulz.eager import prefers_gram


@pytest.mark.parametrize("shape", [(8, 8), (16, 64), (64, 16), (5, 24, 12)])
def test_singular_values_become_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrix = torch.randn(*shape)
    out = newton_schulz(matrix)
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.7 and values.max() < 1.2
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    polar = u @ vh
    cosine = (out * polar).sum() / (out.norm() * polar.norm())
    assert cosine > 0.99


def test_a_batch_equals_its_matrices():
    batch = torch.randn(4, 12, 20)
    torch.testing.assert_close(
        newton_schulz(batch), torch.stack([newton_schulz(m) for m in batch]), rtol=1e-4, atol=1e-5
    )


def test_zero_stays_zero():
    assert newton_schulz(torch.zeros(6, 4)).abs().max() == 0


def ill_conditioned(rows, columns):
    """Return a matrix with singular values from 1 down to 1e-4."""
    left = torch.linalg.qr(torch.randn(rows, rows))[0]
    return left @ torch.diag(torch.logspace(0, -4, rows)) @ torch.linalg.qr(torch.randn(columns, rows))[0].T


SHAPES = [(32, 32), (32, 40), (32, 64), (32, 256), (256, 32), (3, 16, 64), (2, 3, 64, 16), (1, 100)]


@pytest.mark.parametrize("shape", SHAPES)
def test_eager_equals_the_reference(shape):
    matrices = torch.randn(shape)
    expected = newton_schulz(matrices, backend="reference")
    torch.testing.assert_close(newton_schulz(matrices), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(newton_schulz(matrices, dtype=torch.bfloat16), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("steps", [1, 2, 5, 6, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_steps(steps, dtype):
    matrices, coefficients = torch.randn(2, 16, 96), V4_COEFFICIENTS[-steps:]
    expected = newton_schulz(matrices, coefficients, backend="reference")
    atol = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(newton_schulz(matrices, coefficients, dtype), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_of_low_rank_neither_overflow_nor_lose_directions(shape, dtype):
    """After too many steps a Gram matrix has negative eigenvalues, which the iteration drives to infinity."""
    low = torch.randn(shape[0], 4) @ torch.randn(4, shape[1])
    for matrix in (low, low + 1e-3 * torch.randn(shape), ill_conditioned(*sorted(shape)).view(shape)):
        found = torch.linalg.svdvals(newton_schulz(matrix, dtype=dtype))
        expected = torch.linalg.svdvals(newton_schulz(matrix, dtype=dtype, backend="reference"))
        assert found.isfinite().all() and found.max() < 1.05
        torch.testing.assert_close(found[:4], expected[:4], rtol=0, atol=0.03)


def test_wide_matrices_use_the_form_with_fewer_multiplications():
    assert not prefers_gram(512, 512, 10, 5) and not prefers_gram(512, 512, 10, 2)
    assert prefers_gram(128, 512, 10, 5) and prefers_gram(256, 512, 10, 2)


@pytest.mark.parametrize("shape", [(64, 64), (2, 50, 90)])
def test_blocked_symmetric_products_equal_the_reference(shape, monkeypatch):
    monkeypatch.setattr(eager, "has_amx", lambda: False)
    monkeypatch.setattr(eager, "_MIN_BLOCKED_ROWS", {torch.float32: 32})
    matrices = torch.randn(shape)
    torch.testing.assert_close(newton_schulz(matrices), newton_schulz(matrices, backend="reference"), rtol=0, atol=1e-5)


# --- native symmetric products in BF16

needs_bf16_products = pytest.mark.skipif(
    native.level() != "avx512" or not multiplies_bf16_fast("cpu"), reason="no AVX512-BF16 on this machine"
)


@needs_bf16_products
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("rows", [1, 7, 16, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("columns", [1, 2, 31, 32, 65, 128])
def test_native_symmetric_products_round_the_exact_result_once(batch, rows, columns):
    """Sums are float32; only the result is rounded to BF16, by half of 2 ** -8 at most."""
    x = torch.randn(*batch, rows, columns).bfloat16()
    found = cpu._symmetric(x, x.mT)
    gram = x.double() @ x.double().mT
    assert torch.equal(found, found.mT)
    assert ((found - gram).abs() <= 2**-8 * gram.abs() + 1e-5 * columns).all()
    polynomial = cpu._symmetric(found, found, found, -2.0, 0.5)
    exact = 0.5 * found.double() @ found.double() - 2 * found.double()
    size = 0.5 * found.double().abs() @ found.double().abs() + 2 * found.double().abs()  # before cancellation
    assert torch.equal(polynomial, polynomial.mT)
    assert ((polynomial - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * size).all()


@needs_bf16_products
def test_native_symmetric_products_have_the_bits_of_one_matrix_on_one_thread():
    x = torch.randn(5, 96, 200).bfloat16()
    expected = torch.stack([cpu._symmetric(matrix, matrix.mT) for matrix in x])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(cpu._symmetric(x, x.mT), expected)
    finally:
        torch.set_num_threads(threads)


@needs_bf16_products
@pytest.mark.parametrize("shape", [*SHAPES, (100, 100), (2, 128, 256)])
def test_native_bf16_products_follow_the_reference(shape):
    matrices = torch.randn(shape)
    expected = newton_schulz(matrices, backend="reference")
    found = newton_schulz(matrices, dtype=torch.bfloat16, backend="cpu")
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_native_products_run_for_large_bf16_matrices_where_the_processor_has_them(monkeypatch):
    monkeypatch.setattr(native, "level", lambda: "avx512")
    monkeypatch.setattr(cpu, "multiplies_bf16_fast", lambda device: True)
    monkeypatch.setattr(cpu, "has_amx", lambda: False)
    large, small = torch.zeros(2, 64, 80), torch.zeros(63, 80)
    with torch.no_grad():
        assert backend_for(large, torch.bfloat16) == "cpu"
        assert {backend_for(small, torch.bfloat16), backend_for(large, torch.float32)} == {"eager"}
        for module, name, value in (
            (native, "level", "avx2"),
            (cpu, "multiplies_bf16_fast", False),
            (cpu, "has_amx", True),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, lambda *_, value=value: value)
                assert backend_for(large, torch.bfloat16) == "eager"
    assert backend_for(large, torch.bfloat16) == "eager"  # with gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_native_backend_refuses_other_dtypes(dtype):
    with pytest.raises(ValueError, match=f"bfloat16 products on CPUs with AVX512-BF16; found {dtype} products$"):
        newton_schulz(torch.zeros(4, 4), dtype=dtype, backend="cpu")
