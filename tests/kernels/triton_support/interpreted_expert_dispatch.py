"""Run by test_interpreted.py with TRITON_INTERPRET=1."""

import pytest
import torch

from kernels.expert_dispatch import backend_for, by_expert, run_experts
from kernels.expert_dispatch.triton import tile_list


def plan_of(counts):
    """Return the grouping of rows that are in the order of their experts already."""
    return by_expert(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).unsqueeze(1), len(counts))


def inputs(counts, width, inner, dtype=torch.float32):
    """Return rows, gains and the stacks w1, w3 and w2."""
    rows, experts = sum(counts), len(counts)
    shapes = (rows, width), (rows, 1), (experts, inner, width), (experts, inner, width), (experts, width, inner)
    return [torch.randn(shape).to(torch.float32 if shape[-1] == 1 else dtype) for shape in shapes]


def run(backend, counts, given, limit=1.5):
    """Return the outputs and the gradients of all inputs."""
    rows, gains, *stacks = leaves = [x.detach().requires_grad_() for x in given]
    out = run_experts(rows, gains, tuple(stacks), plan_of(counts), limit, backend)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(("counts", "width", "inner"), [([17, 0, 1, 16, 0], 19, 35), ([0, 3], 16, 16)])
def test_experts_equal_the_reference_forward_and_backward(counts, width, inner):
    given = inputs(counts, width, inner)
    for ours, expected in zip(run("triton", counts, given), run("reference", counts, given), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_bf16_products_and_gradients():
    counts = [18, 0, 5]
    given = inputs(counts, 19, 35, torch.bfloat16)
    wide = [x.float() for x in given]
    # No input is near the limit, where rounding decides whether it passes a gradient.
    found, expected = (run(*call, 1e3) for call in (("triton", counts, given), ("reference", counts, wide)))
    for i, (ours, exact) in enumerate(zip(found, expected, strict=True)):
        assert ours.dtype == (torch.float32 if i == 2 else torch.bfloat16)
        torch.testing.assert_close(ours.float(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())


def test_no_rows_leave_gradients_of_zero():
    found = run("triton", [0, 0], inputs([0, 0], 16, 16))
    assert found[0].shape == (0, 16) and not any(x.any() for x in found[3:])


@pytest.mark.parametrize("counts", [[17, 0, 1, 16, 0, 33], [0, 0, 5], [32], [0]])
def test_tiles_cover_every_row_once(counts):
    experts, first_rows = tile_list(torch.tensor(counts), sum(counts), 16)
    assert len(experts) == sum(counts) // 16 + len(counts)
    ends = torch.tensor(counts).cumsum(0).tolist()
    rows = [
        (expert, row)
        for expert, first in zip(experts.tolist(), first_rows.tolist())
        if expert >= 0
        for row in range(first, min(first + 16, ends[expert]))
    ]
    assert rows == [(e, ends[e] - count + i) for e, count in enumerate(counts) for i in range(count)]


def test_unsupported_dtypes_are_refused_with_the_supported_set():
    assert backend_for(torch.zeros(1, 2)) == "eager"
    with pytest.raises(ValueError, match=r"supports dtypes bfloat16, float16, float32; found float64$"):
        run("triton", [2], [x.double() for x in inputs([2], 3, 4)])
