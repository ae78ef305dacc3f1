import math

import pytest
import torch

from serve.engine.sampler import sample, token_logprobs


def draws(
    logits: torch.Tensor, n: int = 2000, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    counts = [0] * len(logits)
    for _ in range(n):
        counts[sample(logits, temperature, top_p, top_k, generator)] += 1
    return counts


LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))


def test_greedy_returns_the_most_likely() -> None:
    assert draws(LOGITS, n=20, temperature=0) == [0, 20, 0, 0]


def test_frequencies_follow_the_distribution() -> None:
    counts = draws(LOGITS)
    for count, p in zip(counts, [0.1, 0.4, 0.2, 0.3]):
        assert abs(count - 2000 * p) < 4 * math.sqrt(2000 * p * (1 - p))


def test_temperature_sharpens() -> None:
    p = torch.tensor([0.1, 0.4, 0.2, 0.3]).pow(2)
    p /= p.sum()
    counts = draws(LOGITS, temperature=0.5)
    for count, q in zip(counts, p.tolist()):
        assert abs(count - 2000 * q) < 4 * math.sqrt(2000 * q * (1 - q))


@pytest.mark.parametrize(("top_k", "kept"), [(1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (9, {0, 1, 2, 3})])
def test_top_k_keeps_the_k_most_likely(top_k: int, kept: set[int]) -> None:
    assert {i for i, count in enumerate(draws(LOGITS, top_k=top_k)) if count} == kept


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, {1}), (0.39, {1}), (0.41, {1, 3}), (0.71, {1, 2, 3}), (0.99, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_sufficient_set(top_p: float, kept: set[int]) -> None:
    assert {i for i, count in enumerate(draws(LOGITS, top_p=top_p)) if count} == kept


def test_top_p_applies_after_top_k() -> None:
    # top_k leaves {0.4, 0.3}; the first has a share of 4/7 = 0.571.
    assert {i for i, count in enumerate(draws(LOGITS, top_k=2, top_p=0.55)) if count} == {1}
    assert {i for i, count in enumerate(draws(LOGITS, top_k=2, top_p=0.59)) if count} == {1, 3}


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    for temperature in (1e-6, 1e-46, 1e-300):
        assert draws(torch.tensor([3.0e4, -3.0e4, 2.9e4]), n=10, temperature=temperature) == [10, 0, 0]


def test_logprobs_equal_log_softmax() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    want = logits.log_softmax(dim=-1)
    worst = logits.argmin(dim=-1).tolist()
    for row, (token, record) in enumerate(zip(worst, token_logprobs(logits, worst, top_n=2))):
        assert record.logprob == want[row, token].item()
        assert [i for i, _ in record.top] == [*want[row].topk(2).indices.tolist(), token]
        assert dict(record.top)[token] == record.logprob
    best = logits.argmax(dim=-1).tolist()
    for record in token_logprobs(logits, best, top_n=1):
        assert len(record.top) == 1
        assert record.top[0] == (record.token_id, record.logprob)
