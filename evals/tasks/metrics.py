"""Metrics of the tasks for lm-eval.

Each score is reported with a ``*_standard_error`` over documents. lm-eval's own standard error is not used, because it
treats the questions of one document as independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from evals.scores import Result, cluster_likelihood, cluster_mean


def recall(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Score the share of the answer's characters that the generated text has at the same positions."""
    answer, text = doc["answer"], results[0]
    score = sum(a == b for a, b in zip(answer, text)) / len(answer)
    return {"recall": (doc["document"], score), "recall_standard_error": (doc["document"], score)}


def likelihood(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    """Score the loss of a span in nats per token. ``results`` holds its log-likelihood."""
    [(total, _)] = [results] if isinstance(results[0], float) else results
    loss = (doc["document"], -total / doc["tokens"])
    return {"likelihood": loss, "likelihood_standard_error": loss, "perplexity": loss}


def mean(results: Sequence[Result]) -> float:
    return cluster_mean(results)[0]


def standard_error(results: Sequence[Result]) -> float:
    return _or_nan(cluster_mean(results)[1])


def mean_likelihood(results: Sequence[Result]) -> float:
    return cluster_likelihood(results)[0]


def likelihood_standard_error(results: Sequence[Result]) -> float:
    return _or_nan(cluster_likelihood(results)[1])


def perplexity(results: Sequence[Result]) -> float:
    return 1 / cluster_likelihood(results)[0]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
