import pytest
import torch

from kernels.index_scores import eager, index_scores

B, H, C = 2, 3, 16


def test_scores_follow_the_formula():
    q, k, w = torch.randn(2, 3, 4, 8), torch.randn(2, 6, 8), torch.randn(2, 3, 4)
    expected = torch.zeros(2, 3, 6)
    for b, s, t, h in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 6, 4))).tolist():
        expected[b, s, t] += w[b, s, h] * max(0.0, float(q[b, s, h] @ k[b, t]))
    torch.testing.assert_close(index_scores(q, k, w), expected, rtol=1e-4, atol=1e-5)


def scored(backend, autocast=False, chosen=None):
    torch.manual_seed(3)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((B, 40, H, C), (B, 10, C), (B, 40, H))]
    if chosen is None:
        permitted = (torch.arange(10) < ((torch.arange(40) + 1) // 4).unsqueeze(1)).unsqueeze(0)
        options = {"permitted": permitted}
    else:
        permitted, options = chosen >= 0, {"chosen": chosen}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = index_scores(*leaves, **options, backend=backend) * permitted
    scores.backward(torch.randn(scores.shape))
    return [scores.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("products", [60, 1 << 18])
def test_eager_equals_the_reference_forward_and_backward_and_under_autocast(products, monkeypatch):
    monkeypatch.setattr("kernels.index_scores.eager._MAX_PRODUCTS", products)
    for options in (("eager", False), ("eager", True), ("reference", True)):
        for found, expected in zip(scored(*options), scored("reference"), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("gathered", [1, 500, 1 << 18])
def test_scores_of_chosen_keys_are_those_among_all_scores(gathered, gathers, monkeypatch):
    monkeypatch.setattr("kernels.chosen_rows._MAX_VALUES", gathered)
    monkeypatch.setattr(eager, "gathers", lambda *given: gathers)
    chosen = torch.rand(B, 40, 10).argsort(-1)[..., :4].clone()
    chosen[:, ::3, 1:] = -1
    query, keys, weights = torch.randn(B, 40, H, C), torch.randn(B, 10, C), torch.randn(B, 40, H)
    found = index_scores(query, keys, weights, chosen=chosen)
    expected = index_scores(query, keys, weights).gather(-1, chosen.clamp(min=0))
    torch.testing.assert_close(found[chosen >= 0], expected[chosen >= 0], rtol=1e-4, atol=1e-5)
    for options in (("eager", False), ("eager", True), ("reference", True)):
        results = scored(*options, chosen), scored("reference", False, chosen)
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_eager_skips_keys_that_no_query_may_see():
    query, keys, weights = torch.randn(1, 8, 2, 4), torch.full((1, 6, 4), float("nan")), torch.randn(1, 8, 2)
    keys[:, :2] = 1.0
    permitted = (torch.arange(6) < 2).expand(1, 8, 6)
    assert index_scores(query, keys, weights, permitted).isfinite().all()
    assert not index_scores(query, keys, weights).isfinite().all()


def test_chosen_keys_are_gathered_where_that_takes_less_time():
    keys, few, many = torch.zeros(1, 1000, C), torch.zeros(1, 1, 10), torch.zeros(1, 1, 900)
    assert eager.gathers(keys, few, 4) and not eager.gathers(keys, many, 64)


@pytest.mark.parametrize("chosen", [None, 4, 10])
def test_scores_are_computed_by_blocks_on_any_device(chosen):
    """An operation that mixes the meta device with the CPU raises."""
    leaves = [torch.randn(s, device="meta", requires_grad=True) for s in ((B, 40, H, C), (B, 100, C), (B, 40, H))]
    if chosen is not None:
        chosen = torch.zeros(B, 40, chosen, dtype=torch.int64, device="meta")
    permitted = torch.ones(1, 40, 100, dtype=torch.bool, device="meta")
    scores = eager._Scores.apply(*leaves, permitted, chosen)
    scores.sum().backward()
    assert scores.shape == (B, 40, 100 if chosen is None else chosen.shape[-1]) and all(x.grad.is_meta for x in leaves)
