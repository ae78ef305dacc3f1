"""Helpers for comparisons between the backends of an operation."""

import pytest
import torch

from kernels import native

needs_native = pytest.mark.skipif(native.level() is None, reason="no native operators on this machine")


def available(backends):
    """Return the names of the backends that can run on this machine."""
    return [name for name in backends if name != "cpu" or native.level() is not None]


def output_and_gradients(function, *inputs):
    """Return the output of ``function`` and the gradients of all inputs, for a fixed gradient of the output."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream.to(out.dtype))
    return out.detach(), *(leaf.grad for leaf in leaves)
