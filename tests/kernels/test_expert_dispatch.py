import pytest
import torch
from backend_testing import output_and_gradients

from kernels.expert_dispatch import by_expert, combine, dispatch, run_experts


def test_rows_of_an_expert_are_padded_to_a_multiple():
    chosen = torch.tensor([[2, 0], [0, 2], [2, 3]])
    plan = by_expert(chosen, 4)
    assert plan.row_to_choice.tolist() == [1, 2, 0, 3, 4, 5] and plan.counts.tolist() == [2, 0, 3, 1]
    assert plan.choice_to_row.tolist() == [[2, 0], [1, 3], [4, 5]] and plan.row_to_token.tolist() == [0, 1, 0, 1, 2, 2]
    plan = by_expert(chosen, 4, 2)
    assert plan.row_to_choice.tolist() == [1, 2, 0, 3, 4, -1, 5, -1] and plan.counts.tolist() == [2, 0, 4, 2]
    assert plan.choice_to_row.tolist() == [[2, 0], [1, 3], [4, 6]]


@pytest.mark.parametrize("tokens", [0, 9])
@pytest.mark.parametrize("narrow", [False, True])
def test_eager_equals_the_reference_and_sums_the_rows_of_every_token(tokens, narrow):
    chosen = torch.rand(tokens, 5).argsort(-1)[:, :2]
    dtype = torch.bfloat16 if narrow else torch.float32
    plan = by_expert(chosen, 5, 4)
    gains = torch.randn(len(plan.row_to_choice), 1).masked_fill(plan.row_to_choice.unsqueeze(-1) < 0, 0)
    x = torch.randn(tokens, 8)

    def run(x, backend):
        rows = dispatch(x, plan, dtype, backend)
        assert rows.dtype == dtype
        return combine(rows * gains.to(dtype), plan, torch.float32, backend)

    found, expected = (output_and_gradients(lambda x, b=b: run(x, b), x) for b in ("eager", "reference"))
    torch.testing.assert_close(found, expected, rtol=0.02 if narrow else 1e-5, atol=0.02 if narrow else 1e-5)
    for n in range(tokens):
        total = sum(x[n] * gains[row] for row in plan.choice_to_row[n].tolist())
        torch.testing.assert_close(found[0][n], total, rtol=0.02 if narrow else 1e-5, atol=0.02 if narrow else 1e-5)


@pytest.mark.parametrize("tokens", [0, 9])
def test_eager_experts_equal_the_reference_and_the_definition(tokens):
    chosen = torch.rand(tokens, 5).argsort(-1)[:, :2]
    plan = by_expert(chosen, 6, 4)  # nobody chooses the last expert
    gains = torch.randn(len(plan.row_to_choice), 1)
    shapes = (6, 7, 8), (6, 7, 8), (6, 8, 7)
    given = [torch.randn(len(gains), 8), gains, *(torch.randn(shape) for shape in shapes)]

    def run(backend, *tensors):
        rows, gains, *stacks = tensors
        return run_experts(rows, gains, tuple(stacks), plan, 1.0, backend)

    found, expected = (output_and_gradients(lambda *t, b=b: run(b, *t), *given) for b in ("eager", "reference"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    rows, _, w1, w3, w2 = given
    for row, expert in enumerate(torch.arange(6).repeat_interleave(plan.counts).tolist()):
        gate, up = (w1[expert] @ rows[row]).clamp(max=1), (w3[expert] @ rows[row]).clamp(-1, 1)
        torch.testing.assert_close(found[0][row], w2[expert] @ (gate * gate.sigmoid() * up) * gains[row])
