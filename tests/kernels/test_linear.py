"""Products with stacks of weights."""

import pytest
import torch

from kernels.linear import grouped_linear


@pytest.mark.parametrize("rows", [0, 5])
def test_products_of_groups_and_their_gradients(rows):
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
