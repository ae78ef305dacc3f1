"""Helpers for comparisons between the backends of an operation."""

import pytest
import torch

from kernels import native
from kernels.cache_io import Pages

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of FP4 without signs, in the order of their codes."""
needs_native = pytest.mark.skipif(native.level() is None, reason="no native operators on this machine")


def available(backends):
    """Return the names of the backends that can run on this machine. ``triton`` has tests in triton_support/."""
    return [name for name in backends if name != "triton" and (name != "cpu" or native.level() is not None)]


def output_and_gradients(function, *inputs):
    """Return the output of ``function`` and the gradients of all inputs, for a fixed gradient of the output."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream.to(out.dtype))
    return out.detach(), *(leaf.grad for leaf in leaves)


def outputs_and_gradients(function, tensors, **options):
    """Return both outputs of ``function(*tensors, **options)``, a pair, and the gradients of all tensors, for fixed
    gradients of the outputs."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    outputs = function(*leaves, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    torch.autograd.backward(outputs, upstream)
    return *(x.detach() for x in outputs), *(leaf.grad for leaf in leaves)


def pages_of(rows, page_size=4):
    """Store entry rows uint8 [B, T, nbytes] in scattered pages among others that must not be read."""
    B, T, nbytes = rows.shape
    count = -(-T // page_size)
    page_table = torch.randperm(B * count + 3)[: B * count].view(B, count)
    storage = torch.full(((B * count + 3) * page_size, nbytes), 0xFF, dtype=torch.uint8)
    for b in range(B):
        for i in range(T):
            storage[page_table[b, i // page_size] * page_size + i % page_size] = rows[b, i]
    return Pages(storage, page_size, page_table)


def positions_of(lengths, rows=1):
    """Return the positions of documents of these lengths, int64 [rows, tokens]."""
    return torch.cat([torch.arange(n) for n in lengths]).expand(rows, -1)


def random_positions(shape):
    """Return the positions of random documents, int64 ``shape[:2]``. The first row begins within a document."""
    batch, tokens = shape[:2]
    rows = [positions_of(torch.randint(1, 9, (tokens,)).tolist())[0] for _ in range(batch)]
    return torch.stack([row[2 * (i == 0) :][:tokens] for i, row in enumerate(rows)])


def poison_new_tensors(monkeypatch):
    """Fill floating-point tensors that ``Tensor.new_empty`` returns with NaN, so that missing outputs are noticed."""
    allocate = torch.Tensor.new_empty

    def poisoned(x, *shape, **options):
        out = allocate(x, *shape, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
