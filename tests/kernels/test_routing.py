import pytest
import torch
from backend_testing import needs_native

from kernels.routing import route


def test_bias_affects_the_choice_but_not_the_weights():
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, 0.0, 1.0, 2.0])
    chosen, weights = route(logits, bias, 2, 1.5, backend="reference")
    assert chosen.tolist() == [[3, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.75]]))


@needs_native
@pytest.mark.parametrize("tokens", [1, 5, 40])
@torch.no_grad()
def test_cpu_equals_the_reference(tokens):
    logits, bias = torch.randn(2, tokens, 8) * 4, torch.randn(8)
    for fixed in (None, torch.randint(0, 8, (2, tokens, 3))):
        found, expected = (route(logits, bias, 3, 1.5, fixed, backend=b) for b in ("cpu", "reference"))
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
    assert route(torch.zeros(1, 6), torch.zeros(6), 2, 1.0)[0].tolist() == [[0, 1]]


@needs_native
def test_cpu_refuses_experts_that_do_not_exist():
    with pytest.raises(IndexError, match="expert 4 of 4"):
        route(torch.randn(2, 4), torch.zeros(4), 1, 1.0, torch.tensor([[0], [4]]), backend="cpu")
