import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.sparse_attention import TiledAttention, eager, sparse_attention

B, H, C, WINDOW = 2, 3, 16, 9


@pytest.mark.parametrize("past", [0, 3, 6])
@pytest.mark.parametrize("length", [1, 5, 7, 8, 23])
@pytest.mark.parametrize("gathered", [False, True])
def test_sparse_attention_is_one_softmax_over_window_entries_and_sink(length, past, gathered):
    torch.manual_seed(length)
    B, H, c, window, T = 2, 3, 8, 7, 5
    q, kv = torch.randn(B, length, H, c), torch.randn(B, past + length, c)
    entries = torch.randn(B, length, T, c) if gathered else torch.randn(B, T, c)
    mask, sink = torch.rand(B, length, T) < 0.6, torch.randn(H)
    out, mass = sparse_attention(q, kv, entries, mask, sink, window)
    mass = mass.of()
    for b in range(B):
        for s in range(length):
            keys = kv[b, max(0, past + s - window + 1) : past + s + 1]
            seen = (entries[b, s] if gathered else entries[b])[mask[b, s]]
            both = torch.cat((keys, seen))
            for h in range(H):
                logits = torch.cat((both @ q[b, s, h] / math.sqrt(c), sink[h : h + 1]))
                weights = logits.softmax(0)[:-1]
                torch.testing.assert_close(out[b, s, h], weights @ both, rtol=1e-4, atol=1e-5)
            expected = sum(
                torch.cat((both @ q[b, s, h] / math.sqrt(c), sink[h : h + 1])).softmax(0)[len(keys) : -1].sum()
                for h in range(H)
            )
            torch.testing.assert_close(mass[b, s].sum(), torch.as_tensor(expected), rtol=1e-4, atol=1e-5)


def test_masked_entries_have_no_effect():
    q, kv, sink = torch.randn(1, 40, 2, 8), torch.randn(1, 40, 8), torch.randn(2)
    alone, _ = sparse_attention(q, kv, None, None, sink, 16)
    nothing = torch.zeros(1, 40, 6, dtype=torch.bool)
    masked, mass = sparse_attention(q, kv, torch.randn(1, 6, 8), nothing, sink, 16)
    torch.testing.assert_close(masked, alone)
    assert mass.of().abs().max() == 0


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


def results(backend, given, autocast=False):
    query, kv, pool, mask, sink, reach = given
    leaves = [x.clone().requires_grad_() for x in (query, kv, *([] if pool is None else [pool]), sink)]
    q, k, *middle, s = leaves
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, mass = sparse_attention(q, k, middle[0] if middle else None, mask, s, WINDOW, reach, backend=backend)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.float().backward(upstream)
    return [out.detach().float(), *([] if mass is None else [mass.of()]), *(x.grad for x in leaves)]


@pytest.fixture(params=[4, 64], autouse=True)
def block_size(request, monkeypatch):
    monkeypatch.setattr(eager, "_MAX_QUERIES", request.param)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "entries"), [(1, 0), (8, 0), (40, 0), (8, 2), (40, 10), (61, 4)])
def test_eager_equals_the_reference_forward_and_backward(length, entries, packed):
    given = inputs(length, entries, packed)
    for found, expected in zip(results("eager", given), results("reference", given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_eager_is_as_accurate_as_the_reference_in_bf16():
    given = inputs(61, 15)
    exact = results("reference", given)
    for found, reference, expected in zip(
        results("eager", given, True), results("reference", given, True), exact, strict=True
    ):
        scale = expected.abs().max()
        assert (found - expected).abs().max() < max(1.5 * (reference - expected).abs().max(), 0.01 * scale)


def latent_results(backend, mask, value_size, autocast=False):
    torch.manual_seed(5)
    query, rows = (torch.randn(*shape).requires_grad_() for shape in ((B, 37, H, C), (B, 37, C)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, mass = sparse_attention(query, None, rows, mask, None, scale=0.3, value_size=value_size, backend=backend)
    out.float().backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    return [out.detach().float(), mass.of(), query.grad, rows.grad]


def causal_mask(dense):
    mask = torch.ones(B, 37, 37, dtype=torch.bool).tril()
    return mask if dense else mask & ((torch.rand(mask.shape) < 0.3) | torch.eye(37, dtype=torch.bool))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("value_size", [1, C - 5, C])
def test_attention_without_a_window_to_values_narrower_than_keys(value_size, dense):
    mask = causal_mask(dense)
    torch.manual_seed(5)
    query, rows = (torch.randn(*shape).requires_grad_() for shape in ((B, 37, H, C), (B, 37, C)))
    logits = torch.einsum("bshc,btc->bsht", query, rows) * 0.3
    weights = logits.masked_fill(~mask.unsqueeze(2), float("-inf")).softmax(-1)
    out = torch.einsum("bsht,btv->bshv", weights, rows[..., :value_size])
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    expected = [out.detach(), weights.detach().sum(2), query.grad, rows.grad]
    for backend in ("reference", "eager"):
        for found, wanted in zip(latent_results(backend, mask, value_size), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_attention_without_a_window_is_as_accurate_as_the_reference_in_bf16():
    mask = causal_mask(dense=False)
    exact = latent_results("reference", mask, 11)
    narrow = [latent_results(backend, mask, 11, autocast=True) for backend in ("eager", "reference")]
    for found, reference, expected in zip(*narrow, exact, strict=True):
        scale = expected.abs().max()
        assert (found - expected).abs().max() < max(1.5 * (reference - expected).abs().max(), 0.01 * scale)


def selection_results(backend, autocast=False):
    """Attend to chosen entries only. Every third query chooses two, the others five."""
    torch.manual_seed(6)
    leaves = [torch.randn(*shape).requires_grad_() for shape in ((B, 37, H, C), (B, 29, C), (H,))]
    query, entries, sink = leaves
    chosen = torch.rand(B, 37, 29).argsort(-1)[..., :5].clone()
    chosen[:, ::3, 2:] = -1
    options = {"scale": 0.3, "value_size": 11, "chosen": chosen, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, mass = sparse_attention(query, None, entries, None, sink, **options)
    out.float().backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    return [out.detach().float(), mass.of(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("gathered", [1, 700, 1 << 18])
def test_attention_to_chosen_entries_equals_the_reference(gathered, monkeypatch):
    monkeypatch.setattr("kernels.chosen_rows._MAX_VALUES", gathered)
    exact = selection_results("reference")
    for found, expected in zip(selection_results("eager"), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    narrow = [selection_results(backend, autocast=True) for backend in ("eager", "reference")]
    for found, reference, expected in zip(*narrow, exact, strict=True):
        scale = expected.abs().max()
        assert (found - expected).abs().max() < max(1.5 * (reference - expected).abs().max(), 0.01 * scale)


class LargestTensor(TorchDispatchMode):
    """Records the most elements of a tensor that an operation returned."""

    most = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.most = max(self.most, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)), 0)
        return result


def test_eager_allocates_nothing_of_heads_times_queries_times_entries():
    length, entries = 512, 128
    given = inputs(length, entries)
    with LargestTensor() as largest:
        results("eager", given)
    assert largest.most <= B * length * entries  # the mass, which is summed over heads


def test_attention_to_chosen_entries_allocates_nothing_of_queries_times_entries(monkeypatch):
    monkeypatch.setattr("kernels.chosen_rows._MAX_VALUES", 1 << 12)
    query, entries = torch.randn(1, 512, H, C).requires_grad_(), torch.randn(1, 512, C).requires_grad_()
    chosen = torch.randint(0, 512, (1, 512, 4))
    with LargestTensor() as largest:
        sparse_attention(query, None, entries, None, None, chosen=chosen)[0].sum().backward()
    assert largest.most <= 512 * H * C


# --- tiles


@pytest.mark.parametrize("tile", [1, 4, 9])
@pytest.mark.parametrize("kind", ["none", "shared", "gathered"])
def test_tiled_attention_equals_the_reference(kind, tile):
    T, tokens = 9, 7
    query, kv, sink = torch.randn(B, tokens, H, C), torch.randn(B, WINDOW - 1 + tokens, C), torch.randn(H)
    entries, mask = torch.randn(B, *([tokens] if kind == "gathered" else []), T, C), torch.rand(B, tokens, T) < 0.5
    mask[0, 0] = False
    attention = TiledAttention(query.flatten(0, 1), sink)
    windows = kv.unfold(1, WINDOW, 1).transpose(2, 3).flatten(0, 1)
    attention.add(windows, torch.ones(B * tokens, WINDOW, dtype=torch.bool))
    if kind == "none":
        expected, _ = sparse_attention(query, kv, None, None, sink, WINDOW, backend="reference")
    else:
        keys = (entries if kind == "gathered" else entries.unsqueeze(1).expand(B, tokens, -1, -1)).flatten(0, 1)
        for begin in range(0, T, tile):
            attention.add(keys[:, begin : begin + tile], mask.flatten(0, 1)[:, begin : begin + tile])
        expected, _ = sparse_attention(query, kv, entries, mask, sink, WINDOW, backend="reference")
    torch.testing.assert_close(attention.output().view_as(query), expected, rtol=1e-5, atol=1e-5)


def test_masked_tiles_change_no_bits():
    query, keys, mask = torch.randn(16, H, 24), torch.randn(16, 5, 24), torch.rand(16, 5) < 0.7
    mask[0] = False  # attends to the sink alone
    alone, among = (TiledAttention(query, torch.randn(H, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    alone.add(keys, mask)
    for _ in range(3):
        among.add(torch.randn(16, 64, 24) * 100, torch.zeros(16, 64, dtype=torch.bool))
    among.add(keys, mask)
    among.add(torch.randn(16, 64, 24) * 100, torch.zeros(16, 64, dtype=torch.bool))
    assert torch.equal(among.output(), alone.output())
    assert torch.equal(alone.output()[0], torch.zeros(H, 24))


def test_values_may_be_the_first_dims_of_keys():
    query, keys = torch.randn(4, H, 8), torch.randn(4, 11, 8)
    attention = TiledAttention(query, scale=0.2, value_size=5)
    for some in (slice(0, 5), slice(5, 11)):
        attention.add(keys[:, some], torch.ones(4, some.stop - some.start, dtype=torch.bool))
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, keys[..., :5], scale=0.2)
    torch.testing.assert_close(attention.output(), expected)


def test_values_may_differ_from_keys():
    query, keys, values = torch.randn(4, H, 8), torch.randn(4, 11, 8), torch.randn(4, 11, 8)
    attention = TiledAttention(query, torch.full((H,), float("-inf")))
    for some in (slice(0, 5), slice(5, 11)):
        attention.add(keys[:, some], torch.ones(4, some.stop - some.start, dtype=torch.bool), values[:, some])
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    torch.testing.assert_close(attention.output(), expected)
