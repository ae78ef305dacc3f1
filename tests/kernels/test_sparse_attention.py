"""Attention in blocks of queries beside the readable one, forward and backward."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.index_topk import index_scores
from kernels.sparse_attention import blocked, sparse_attention

B, H, C, WINDOW = 2, 3, 16, 9


def inputs(length, entries, packed=False):
    torch.manual_seed(length)
    query, kv = torch.randn(B, length, H, C), torch.randn(B, length, C)
    pool = torch.randn(B, entries, C) if entries else None
    mask = reach = None
    if entries:
        visible = (torch.arange(length) + 1) // (length // entries)
        mask = (torch.arange(entries) < visible.unsqueeze(-1)) & (torch.rand(B, length, entries) < 0.5)
    if packed:
        reach = torch.minimum(torch.arange(length) % 13 + 1, torch.tensor(WINDOW)).expand(B, -1)
    return query, kv, pool, mask, torch.randn(H), reach


def through(backend, given, autocast=False):
    query, kv, pool, mask, sink, reach = given
    leaves = [x.clone().requires_grad_() for x in (query, kv, *([] if pool is None else [pool]), sink)]
    q, k, *middle, s = leaves
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, mass = sparse_attention(q, k, middle[0] if middle else None, mask, s, WINDOW, reach, backend=backend)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.float().backward(upstream)
    return [out.detach().float(), *([] if mass is None else [mass]), *(x.grad for x in leaves)]


@pytest.fixture(params=[4, 64], autouse=True)
def queries(request, monkeypatch):
    monkeypatch.setattr(blocked, "_QUERIES", request.param)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "entries"), [(1, 0), (8, 0), (40, 0), (8, 2), (40, 10), (61, 4)])
def test_numbers_and_gradients_are_the_readable_ones(length, entries, packed):
    given = inputs(length, entries, packed)
    for found, expected in zip(through("blocked", given), through("reference", given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_products_in_bf16_are_as_close_as_the_readable_ones():
    given = inputs(61, 15)
    exact = through("reference", given)
    for found, readable, expected in zip(
        through("blocked", given, True), through("reference", given, True), exact, strict=True
    ):
        scale = expected.abs().max()
        assert (found - expected).abs().max() < max(1.5 * (readable - expected).abs().max(), 0.01 * scale)


class Largest(TorchDispatchMode):
    """The most numbers that an operation gave in one tensor."""

    most = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.most = max(self.most, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)), 0)
        return result


def test_nothing_is_made_of_heads_times_queries_times_entries():
    length, entries = 512, 128
    given = inputs(length, entries)
    with Largest() as made:
        through("blocked", given)
    assert made.most <= B * length * entries  # the mass, of all heads together


def scored(backend, autocast=False):
    torch.manual_seed(3)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((B, 40, H, C), (B, 10, C), (B, 40, H))]
    permitted = torch.arange(10) < ((torch.arange(40) + 1) // 4).unsqueeze(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = index_scores(*leaves, permitted.unsqueeze(0), backend=backend) * permitted
    scores.backward(torch.randn(scores.shape))
    return [scores.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("products", [60, 1 << 18])
def test_index_scores_and_gradients_are_the_readable_ones(products, monkeypatch):
    monkeypatch.setattr("kernels.index_topk.blocked._PRODUCTS", products)
    for way in (("blocked", False), ("blocked", True), ("reference", True)):
        for found, expected in zip(scored(*way), scored("reference"), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_causality_hides_from_all_is_not_scored():
    query, keys, weights = torch.randn(1, 8, 2, 4), torch.full((1, 6, 4), float("nan")), torch.randn(1, 8, 2)
    keys[:, :2] = 1.0
    permitted = (torch.arange(6) < 2).expand(1, 8, 6)
    assert index_scores(query, keys, weights, permitted).isfinite().all()
    assert not index_scores(query, keys, weights).isfinite().all()
