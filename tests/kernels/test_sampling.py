"""Sampling: the native operator equals the reference, and both follow the distribution."""

import math

import pytest
import torch
from backend_testing import needs_native

from kernels.sampling import backend_for, sample

BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]


def sample_one(logits: list[float], backend: str, uniform: float = 0.0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    with torch.no_grad():
        rows = torch.tensor([logits])
        return sample(rows, [uniform], [temperature], [top_k], [top_p], [min_p], backend=backend)[0]


def settings(rows: int, seed: int) -> list[list]:
    """Return random numbers and settings of each kind, alone and combined."""
    generator = torch.Generator().manual_seed(seed)
    choose = lambda values: [values[i] for i in torch.randint(0, len(values), (rows,), generator=generator).tolist()]  # noqa: E731
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64).tolist()
    return [
        uniform,
        choose([0.0, 1e-3, 0.7, 1.0, 2.5]),
        choose([0, 0, 1, 5, 100, 5000]),
        choose([1.0, 1.0, 0.0, 0.313, 0.9517]),  # no boundary at a token of equal ones
        choose([0.0, 0.0, 0.05, 0.9]),
    ]


@needs_native
@pytest.mark.parametrize("vocab", [1, 2, 17, 258, 3000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_the_native_operator_equals_the_reference(vocab, scale) -> None:
    logits = scale * torch.randn(200, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[::3, : vocab // 4] = -torch.inf
    logits[1::7] = logits[1::7].round()  # ties
    chosen = settings(200, vocab)
    with torch.no_grad():
        assert sample(logits, *chosen, backend="cpu") == sample(logits, *chosen, backend="reference")
        assert backend_for(logits) == "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_uniform_number_selects_its_interval_of_the_distribution(backend) -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    for uniform, token in ((0.0, 0), (0.05, 0), (0.15, 1), (0.45, 1), (0.55, 2), (0.75, 3), (1 - 2**-53, 3)):
        assert sample_one(logits, backend, uniform) == token
    # The three most likely in descending order: 4/9, 3/9, 2/9.
    for uniform, token in ((0.0, 1), (0.4, 1), (0.5, 3), (0.75, 3), (0.8, 2), (1 - 2**-53, 2)):
        assert sample_one(logits, backend, uniform, top_k=3) == token


@pytest.mark.parametrize("backend", BACKENDS)
def test_excluded_tokens_are_never_drawn(backend) -> None:
    inf = math.inf
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert sample_one([-inf, 1.0, -inf], backend, uniform) == 1
        assert sample_one([0.0, 1.0, 0.0, -inf], backend, uniform, top_p=0.0) == 1
        assert sample_one([3e4, -3e4, 2.9e4], backend, uniform, temperature=1e-300) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_are_reported(backend, bad, temperature) -> None:
    rows = torch.zeros(3, 40)
    rows[1, 33], rows[2] = bad, -math.inf
    with torch.no_grad():
        assert sample(rows, [0.0] * 3, [temperature] * 3, [0] * 3, [1.0] * 3, [0.0] * 3, backend=backend) == [0, -1, -1]


@needs_native
def test_malformed_arguments_of_the_native_operator_are_refused() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="sample: 1 values for 2 rows"):
        sample(torch.zeros(2, 4), [0.0], [1.0], [0], [1.0], [0.0], backend="cpu")
