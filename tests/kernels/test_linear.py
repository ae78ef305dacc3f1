import pytest
import torch
from backend_testing import needs_native

from kernels.linear import MAX_NATIVE_TOKENS, backend_for, grouped_linear, linear, linear_concat


@pytest.mark.parametrize("rows", [0, 5])
def test_grouped_products_and_their_gradients(rows):
    x, weight = torch.randn(2, rows, 3, 8), torch.randn(3, 6, 8)
    found = []
    for product in (
        lambda x, weight: grouped_linear(x.flatten(2), weight).unflatten(-1, (3, 6)),
        lambda x, weight: torch.einsum("bsgi,goi->bsgo", x, weight),
    ):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = product(*leaves)
        (out * torch.arange(float(out.numel())).view_as(out)).sum().backward()
        found.append((out.detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(*found)


@needs_native
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"),
    [(1, 64, 8), (3, 33, 7), (8, 5, 1), (1, 1, 3), (4, 64, 4), (7, 48, 6), (16, 80, 13)],
)
@torch.no_grad()
def test_cpu_equals_exact_products(tokens, inputs, outputs, stored):
    x, weight = torch.randn(1, tokens, inputs), torch.randn(outputs, inputs).to(stored)
    assert backend_for(x, weight) == "cpu"
    torch.testing.assert_close(linear(x, weight), x @ weight.float().t(), rtol=1e-5, atol=1e-5)
    stack = torch.randn(3, outputs, inputs).to(stored)
    both = linear_concat(x, [weight, stack[0]], backend="cpu")
    expected = torch.cat([x @ w.float().t() for w in (weight, stack[0])], dim=-1)
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)
    rows = torch.randn(1, tokens, 3, inputs)
    expected = torch.einsum("btgi,goi->btgo", rows, stack.float()).flatten(2)
    assert backend_for(rows.flatten(2), stack) == "cpu"
    torch.testing.assert_close(grouped_linear(rows.flatten(2), stack), expected, rtol=1e-5, atol=1e-5)
    apart = torch.cat((torch.randn(3, 2, inputs).to(stored), stack), dim=1)[:, 2:]  # views of every group's last rows
    assert backend_for(rows.flatten(2), apart) == "cpu"
    torch.testing.assert_close(grouped_linear(rows.flatten(2), apart), expected, rtol=1e-5, atol=1e-5)


@needs_native
@torch.no_grad()
def test_many_tokens_gradients_and_strided_weights_run_in_pytorch():
    weight = torch.randn(6, 4)
    assert backend_for(torch.randn(1, MAX_NATIVE_TOKENS + 1, 4), weight) == "reference"
    assert backend_for(torch.randn(1, 1, 4), torch.randn(4, 6).t()) == "reference"
    with torch.enable_grad():
        assert backend_for(torch.randn(1, 1, 4), weight) == "reference"
