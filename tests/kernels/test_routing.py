import math

import pytest
import torch
from backend_testing import needs_native

from kernels.routing import affinity, route


def test_bias_affects_the_choice_but_not_the_weights():
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, 0.0, 1.0, 2.0])
    chosen, weights = route(logits, bias, 2, 1.5, backend="reference")
    assert chosen.tolist() == [[3, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.75]]))


def test_affinities_follow_their_formulas():
    logits = torch.tensor([-3.0, 0.0, 2.5])
    expected = torch.tensor([math.sqrt(math.log1p(math.exp(z))) for z in logits.tolist()])
    torch.testing.assert_close(affinity(logits, "sqrtsoftplus"), expected)
    expected = torch.tensor([1 / (1 + math.exp(-z)) for z in logits.tolist()])
    torch.testing.assert_close(affinity(logits, "sigmoid"), expected)
    with pytest.raises(KeyError, match="unknown scoring 'softmax'; choose one of sqrtsoftplus, sigmoid"):
        route(logits, logits, 1, 1.0, scoring="softmax")


def by_hand(logits, bias, k, scale, groups, groups_per_token):
    """Return experts and weights of one token by sigmoid routing, in plain Python."""
    affinities = [1 / (1 + math.exp(-z)) for z in logits]
    keys = [a + b for a, b in zip(affinities, bias)]
    size = len(keys) // groups
    score = {g: sum(sorted(keys[g * size : (g + 1) * size])[-2:]) for g in range(groups)}
    best = sorted(score, key=score.get, reverse=True)[:groups_per_token]
    experts = [e for e in range(len(keys)) if e // size in best]
    chosen = sorted(experts, key=lambda e: keys[e], reverse=True)[:k]
    total = sum(affinities[e] for e in chosen)
    return chosen, [affinities[e] / total * scale for e in chosen]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize(("groups", "groups_per_token", "k"), [(1, 1, 3), (4, 1, 2), (4, 2, 3), (3, 2, 8), (6, 5, 4)])
@torch.no_grad()
def test_experts_come_from_the_best_groups(backend, groups, groups_per_token, k):
    torch.manual_seed(0)
    logits, bias = torch.randn(20, 12) * 2, torch.randn(12) * 0.3
    chosen, weights = route(logits, bias, k, 2.5, None, "sigmoid", groups, groups_per_token, backend)
    for t in range(20):
        experts, expected = by_hand(logits[t].tolist(), bias.tolist(), k, 2.5, groups, groups_per_token)
        assert chosen[t].tolist() == experts
        torch.testing.assert_close(weights[t], torch.tensor(expected))
    unlimited = route(logits, bias, k, 2.5, None, "sigmoid", backend=backend)[0]
    assert torch.equal(chosen, unlimited) is (groups == 1)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid"])
@torch.no_grad()
def test_weights_are_finite_for_affinities_that_vanish(backend, scoring):
    logits = torch.full((1, 4), -500.0)
    weights = route(logits, torch.zeros(4), 2, 1.0, scoring=scoring, backend=backend)[1]
    assert torch.equal(weights, torch.zeros(1, 2))


@needs_native
@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@torch.no_grad()
def test_cpu_equals_the_reference(tokens, scoring):
    logits, bias = torch.randn(2, tokens, 8) * 4, torch.randn(8)
    for fixed, *groups in ((None, 1, 1), (None, 4, 2), (torch.randint(0, 8, (2, tokens, 3)), 1, 1)):
        found, expected = (
            route(logits, bias, 3, 1.5, fixed, scoring, *groups, backend=b) for b in ("cpu", "reference")
        )
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
    assert route(torch.zeros(1, 6), torch.zeros(6), 2, 1.0)[0].tolist() == [[0, 1]]


@needs_native
@pytest.mark.parametrize(
    ("groups", "message"),
    [((3, 1), "1 of 3 groups of 8 experts"), ((4, 5), "5 of 4 groups"), ((4, 1), "3 experts of 1 groups of 2")],
)
def test_cpu_refuses_groups_that_do_not_fit(groups, message):
    with pytest.raises(ValueError, match=message):
        route(torch.randn(2, 8), torch.zeros(8), 3, 1.0, None, "sigmoid", *groups, backend="cpu")


@needs_native
def test_cpu_refuses_experts_that_do_not_exist():
    with pytest.raises(IndexError, match="expert 4 of 4"):
        route(torch.randn(2, 4), torch.zeros(4), 1, 1.0, torch.tensor([[0], [4]]), backend="cpu")


@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid"])
@pytest.mark.parametrize("experts", [3, 5, 6, 24, 40])
@torch.no_grad()
def test_affinities_of_a_token_have_the_same_bits_in_any_batch(scoring, experts):
    logits = torch.randn(41, experts) * 3
    together = affinity(logits, scoring)
    assert torch.equal(together, torch.stack([affinity(row, scoring) for row in logits]))
    assert torch.equal(together[7:20], affinity(logits[7:20].contiguous(), scoring))
