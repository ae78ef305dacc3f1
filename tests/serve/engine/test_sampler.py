import math

import pytest
import torch

from serve.engine.logprobs import token_logprobs
from serve.engine.sampler import Sampler, change_logits, sample_tokens
from serve.engine.sampling_params import SamplingParams


def sampler(seed: int = 0, prompt=(), stop_ids=(), **params) -> Sampler:
    return Sampler(SamplingParams(seed=seed, **params), prompt, stop_ids)


def draws(logits: torch.Tensor, n: int = 2000, **params) -> list[int]:
    """Return how often each token was drawn by ``n`` completions with different seeds."""
    tokens = sample_tokens(logits.expand(n, -1), [sampler(seed, **params) for seed in range(n)])
    return torch.tensor(tokens).bincount(minlength=len(logits)).tolist()


def changed_logits(logits: torch.Tensor, one: Sampler) -> list[float]:
    changed = logits.clone()[None]
    change_logits(changed, [one])
    return changed[0].tolist()


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


@pytest.mark.parametrize(("min_p", "kept"), [(0.0, {0, 1, 2, 3}), (0.3, {1, 2, 3}), (0.6, {1, 3}), (1.0, {1})])
def test_min_p_is_relative_to_the_most_likely(min_p: float, kept: set[int]) -> None:
    assert {i for i, count in enumerate(draws(LOGITS, min_p=min_p)) if count} == kept


@pytest.mark.parametrize("gradients", [False, True])  # enabled gradients exclude the native operator
def test_a_draw_does_not_depend_on_the_batch(gradients) -> None:
    generator = torch.Generator().manual_seed(0)
    settings = [
        {}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}, {"temperature": 0}, {"presence_penalty": 1.0},
        {"repetition_penalty": 1.3, "top_p": 0.9}, {"logit_bias": {3: 5.0, 7: -100.0}, "frequency_penalty": 0.5},
        {"logit_bias": {1: 2.0}, "temperature": 0, "repetition_penalty": 0.8}, {"min_tokens": 9, "top_k": 3},
    ]  # fmt: skip
    logits = torch.randn(len(settings), 50, generator=generator)
    make = lambda: [sampler(i, prompt=[1, 2, 2], stop_ids=[i, 4], **params) for i, params in enumerate(settings)]  # noqa: E731
    together, alone = make(), make()
    with torch.set_grad_enabled(gradients):
        for _ in range(20):
            expected = [sample_tokens(row[None], [one])[0] for row, one in zip(logits, alone)]
            assert sample_tokens(logits, together) == expected
            logits = logits.roll(1, dims=1)


def test_the_same_seed_gives_the_same_tokens() -> None:
    logits = torch.zeros(1, 100)
    first, second, other = ([sample_tokens(logits, [s])[0] for _ in range(8)] for s in map(sampler, (7, 7, 8)))
    assert first == second != other


def test_penalties_change_the_logits_as_defined() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 3.0, 1.0])
    one = sampler(prompt=[0, 1], temperature=0, repetition_penalty=2.0)
    one.count(3)
    assert changed_logits(logits, one) == [1.0, -2.0, 0.5, 1.5, 1.0]
    one = sampler(prompt=[0], temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    for token in (3, 3, 4):
        one.count(token)
    assert changed_logits(logits, one) == [2.0, -1.0, 0.5, 3.0 - 0.5 - 2 * 0.25, 1.0 - 0.5 - 0.25]
    one = sampler(temperature=0, logit_bias={1: 10.0, 3: -100.0})
    assert changed_logits(logits, one) == [2.0, 9.0, 0.5, -97.0, 1.0]
    assert logits.tolist() == [2.0, -1.0, 0.5, 3.0, 1.0]


def test_rows_that_are_not_finite_get_no_token_and_keep_their_state() -> None:
    logits = torch.zeros(2, 5)
    logits[0, 3] = torch.nan
    bad, good = sampler(min_tokens=1), sampler(1)
    tokens = sample_tokens(logits, [bad, good])
    assert tokens[0] == -1 and tokens[1] >= 0
    assert (bad.generated, good.generated) == (0, 1)


def test_min_tokens_delays_stop_tokens() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 4.0]])
    one = sampler(stop_ids=[1, 3], temperature=0, min_tokens=2)
    assert [sample_tokens(logits, [one])[0] for _ in range(3)] == [2, 2, 1]


def test_sampling_leaves_the_logits_unchanged() -> None:
    logits = torch.tensor([[1.0, 2.0]])
    sample_tokens(logits, [sampler(logit_bias={0: 50.0})])
    assert logits.tolist() == [[1.0, 2.0]]


def test_a_banned_token_is_never_drawn() -> None:
    assert draws(LOGITS, logit_bias={3: float("-inf")})[3] == 0


def test_logprobs_equal_log_softmax() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    want = logits.log_softmax(dim=-1)
    worst = logits.argmin(dim=-1).tolist()
    for row, (token, record) in enumerate(zip(worst, token_logprobs(logits, worst, [2, 0, 1]))):
        assert record.logprob == want[row, token].item()
        assert [i for i, _ in record.top] == [*want[row].topk([2, 0, 1][row]).indices.tolist(), token]
        assert dict(record.top)[token] == record.logprob
    best = logits.argmax(dim=-1).tolist()
    for record in token_logprobs(logits, best, [1, 1, 1]):
        assert record.top == ((record.token_id, record.logprob),)
