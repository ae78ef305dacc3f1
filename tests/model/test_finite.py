import pytest
import torch

from model.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_value_that_is_not_finite_is_found(dtype):
    values = torch.randn(3, 5).to(dtype)
    assert is_finite(values)
    for value in (float("nan"), float("inf"), -float("inf")):
        changed = values.clone()
        changed[1, 2] = value
        assert not is_finite(changed)


def test_empty_and_integer_tensors_are_finite():
    assert is_finite(torch.zeros(0, 4)) and is_finite(torch.tensor([3, -1])) and is_finite(torch.tensor([True]))
