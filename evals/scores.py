"""Scores of a task with their standard errors, and the effective length."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

EFFECTIVE_SHARE = 0.85
"""Share of the score at the training length that still counts as effective, as in RULER (Hsieh et al. 2024)."""

Result = tuple[int, float]
"""The document of a question and the question's score."""

_METRIC = re.compile(r"eval/(?P<task>[^/]+)/(?P<length>[0-9]+)(/(?P<depth>[0-9.e-]+))?/(?P<score>[^/]+)")


class Point(NamedTuple):
    """A task at one length and, if it has depths, one depth."""

    task: str
    length: int
    depth: float | None

    @property
    def name(self) -> str:
        return f"{self.task}/{self.length}" + ("" if self.depth is None else f"/{self.depth:g}")

    def metric(self, score: str) -> str:
        """Return the name of the metric that holds a score, such as ``recall``, at this point."""
        return f"eval/{self.name}/{score}"

    @classmethod
    def parse(cls, metric: str) -> tuple[Point, str] | None:
        """Return the point and the score that a metric's name holds (:meth:`metric`), or None for other metrics."""
        match = _METRIC.fullmatch(metric)
        if match is None:
            return None
        depth = match["depth"]
        return cls(match["task"], int(match["length"]), None if depth is None else float(depth)), match["score"]


def cluster_mean(results: Iterable[Result]) -> tuple[float, float | None]:
    """Return the mean over documents of their mean scores, and its standard error, None for a single document.

    Questions of one document are not independent, so documents are counted, not questions.
    """
    by_document: dict[int, list[float]] = defaultdict(list)
    for document, score in results:
        by_document[document].append(score)
    means = [statistics.fmean(scores) for scores in by_document.values()]
    stderr = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return statistics.fmean(means), stderr


def cluster_likelihood(results: Iterable[Result]) -> tuple[float, float | None]:
    """Return exp(-mean) of losses in nats per token, the geometric mean probability of a token, and its standard error
    to first order."""
    loss, stderr = cluster_mean(results)
    likelihood = math.exp(-loss)
    return likelihood, None if stderr is None else likelihood * stderr


def effective_length(
    scores: Mapping[int, float], training_length: int, chance: float, stderr: float | None = None
) -> int | None:
    """Return the longest length up to which no score is below :data:`EFFECTIVE_SHARE` of the training length's.

    Args:
        scores: Score by length. Lengths below ``training_length`` are ignored.
        chance: Score of a model that has learned nothing.
        stderr: Standard error of the score at the training length.

    Returns:
        None if that score is within two standard errors of chance.
    """
    reference = scores[training_length]
    if reference - 2 * (stderr or 0.0) <= chance:
        return None
    effective = training_length
    for length in sorted(length for length in scores if length > training_length):
        if scores[length] < EFFECTIVE_SHARE * reference:
            break
        effective = length
    return effective
