"""Short causal convolutions: backends against each other, packed documents, and convolution in pieces."""

import pytest
import torch
import torch.nn.functional as F
from backend_testing import available, needs_native, positions_of

from kernels.causal_conv import BACKENDS, causal_conv

SHAPES = [(1, 1, 1, 2), (2, 3, 5, 4), (3, 17, 64, 3), (2, 9, 67, 7), (1, 130, 130, 2)]
"""Batch, tokens, channels, kernel."""


def inputs(batch, tokens, channels, kernel, dtype=torch.float32):
    return (
        torch.randn(batch, tokens, channels, dtype=dtype),
        torch.randn(channels, kernel, dtype=dtype),
        torch.randn(channels, dtype=dtype),
        torch.randn(batch, kernel - 1, channels, dtype=dtype),
    )


@pytest.mark.parametrize("backend", available(BACKENDS))
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_a_padded_convolution(shape, backend):
    x, weight, bias, tail = inputs(*shape)
    for before in (torch.zeros_like(tail), tail):
        rows = torch.cat((before, x), dim=1).transpose(1, 2)
        expected = F.silu(F.conv1d(rows, weight.unsqueeze(1), bias, groups=shape[2])).transpose(1, 2)
        found, next_tail = causal_conv(x, weight, bias, None if before is not tail else tail, backend=backend)
        torch.testing.assert_close(found, expected)
        assert torch.equal(next_tail, rows.transpose(1, 2)[:, shape[1] :])


@pytest.mark.parametrize("backend", available(BACKENDS))
def test_pieces_continue_from_the_tail(backend):
    x, weight, bias, tail = inputs(2, 23, 6, 5)
    expected, last = causal_conv(x, weight, bias, tail, backend=backend)
    outputs = []
    for piece in x.split([1, 2, 9, 1, 1, 9], dim=1):
        out, tail = causal_conv(piece, weight, bias, tail, backend=backend)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected)
    assert torch.equal(tail, last)


@pytest.mark.parametrize("backend", available(BACKENDS))
def test_documents_do_not_reach_one_another(backend):
    lengths = [1, 2, 5, 1, 7, 3]
    x, weight, bias, _ = inputs(2, sum(lengths), 9, 4)
    packed, _ = causal_conv(x, weight, bias, positions=positions_of(lengths, 2), backend=backend)
    alone = [causal_conv(piece, weight, bias, backend=backend)[0] for piece in x.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


@needs_native
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_gradients_equal_the_reference(shape, optional, documents):
    tensors = inputs(*shape)
    if not optional:
        tensors = tensors[:2]
    positions = positions_of([1, 2] * shape[1], shape[0])[:, : shape[1]] if documents else None
    upstream = torch.randn(shape[:3])
    found = []
    for backend in ("cpu", "reference"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, _ = causal_conv(*leaves, positions=positions, backend=backend)
        out.backward(upstream)
        found.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@needs_native
def test_cpu_reads_rows_within_wider_ones():
    wide, (_, weight, bias, _) = torch.randn(2, 8, 40), inputs(2, 8, 17, 3)
    found, _ = causal_conv(wide[..., 5:22], weight, bias, backend="cpu")
    torch.testing.assert_close(found, causal_conv(wide[..., 5:22], weight, bias, backend="reference")[0])


def test_the_gradient_is_the_functions():
    tensors = [x.requires_grad_() for x in inputs(2, 5, 3, 3, torch.float64)]
    for positions in (None, positions_of([2, 3], 2)):
        assert torch.autograd.gradcheck(lambda *t, p=positions: causal_conv(*t, p), tensors)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 2)}, "do not match"),
        ({"tail": torch.zeros(1, 2, 3)}, "tail does not match"),
        ({"positions": torch.zeros(1, 4, dtype=torch.int64)}, "expected positions"),
    ],
)
def test_cpu_refuses_shapes_that_do_not_match(change, message):
    arguments = {"x": torch.zeros(1, 5, 3), "weight": torch.zeros(3, 2), **change}
    with pytest.raises(ValueError, match=message):
        causal_conv(**arguments, backend="cpu")
