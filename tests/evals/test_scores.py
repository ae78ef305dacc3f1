"""Scores over documents, and the effective length."""

from __future__ import annotations

import math
import statistics

import pytest

from evals.scores import Point, cluster_likelihood, cluster_mean, effective_length


@pytest.mark.parametrize("point", [Point("mqar", 256, None), Point("needle", 1024, 0.1), Point("perplexity", 64, 0.0)])
def test_the_name_of_a_metric_holds_its_point(point):
    assert Point.parse(point.metric("recall_stderr")) == (point, "recall_stderr")


@pytest.mark.parametrize(
    "name", ["eval/recall", "eval/mqar/effective_length", "validation/recall", "train/a/256/recall"]
)
def test_other_metrics_have_no_point(name):
    assert Point.parse(name) is None


def test_standard_error_counts_documents_not_questions():
    scores = {0: [1, 1], 1: [1, 1], 2: [0, 0], 3: [0, 1]}
    results = [(document, float(score)) for document, found in scores.items() for score in found]
    mean, stderr = cluster_mean(results)
    assert mean == 0.625
    assert stderr == pytest.approx(statistics.stdev([1, 1, 0, 0.5]) / 2)
    assert cluster_mean(results[:2]) == (1.0, None)


def test_likelihood_is_the_inverse_of_perplexity_with_the_error_of_the_loss():
    results = [(0, 1.0), (1, 2.0), (2, 3.0)]
    likelihood, stderr = cluster_likelihood(results)
    assert likelihood == pytest.approx(math.exp(-2))
    assert stderr == pytest.approx(math.exp(-2) * 1 / math.sqrt(3))
    # To first order, the error is that of the losses.
    moved, _ = cluster_likelihood([(d, loss + 1e-5) for d, loss in results])
    assert (likelihood - moved) / 1e-5 == pytest.approx(likelihood, rel=1e-4)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({256: 1.0, 512: 0.9, 1024: 0.84}, 512),
        ({256: 1.0, 512: 0.85, 1024: 0.86}, 1024),
        ({256: 1.0, 512: 0.5, 1024: 1.0}, 256),  # a gap ends it
        ({128: 0.1, 256: 0.8, 512: 0.7}, 512),  # relative to the training length; shorter lengths do not count
        ({1024: 1.0, 256: 1.0, 512: 0.2}, 256),  # in any order
        ({256: 0.12, 512: 0.12}, None),  # chance
    ],
)
def test_effective_length(scores, expected):
    assert effective_length(scores, 256, chance=0.1, stderr=0.02) == expected
