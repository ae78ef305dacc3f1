"""Intervals and paired tests over seeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from model.wording import count

MIN_SEEDS = 3
"""Fewest seeds for an interval or a test."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds, with a t interval.

    The half width is None for fewer than MIN_SEEDS values, and where one is not finite, as after a training that
    diverged.
    """

    mean: float
    half_width: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """Mean paired difference from the reference, its t interval, and the p value of the two-sided paired t-test.

    ``p`` is None without a half width, and where all differences are equal.
    """

    mean: float
    half_width: float | None
    p: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of ``values`` and its t interval: mean ± t(0.975, n - 1) s / sqrt(n)."""
    mean = sum(values) / len(values)
    half = None
    if len(values) >= MIN_SEEDS and math.isfinite(mean):
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
        half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, half, tuple(values))


def paired(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Return the difference of ``values`` from ``reference``, whose items belong to the same seeds.

    Raises ValueError for sequences of different lengths.
    """
    if len(values) != len(reference):
        raise ValueError(f"{len(values)} values cannot be paired with {len(reference)}")
    found = estimate([value - other for value, other in zip(values, reference)])
    p = None
    if found.half_width:
        p = float(stats.ttest_1samp(found.values, 0.0).pvalue)
    return Difference(found.mean, found.half_width, p)


def adjusted(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the p values by name with Holm's correction for testing all of them. None stays None."""
    tested = sorted((p, name) for name, p in p_values.items() if p is not None)
    found: dict[str, float | None] = dict.fromkeys(p_values)
    highest = 0.0
    for index, (p, name) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - index) * p))
        found[name] = highest
    return found


def tokens_to(line: Sequence[tuple[float, float]], loss: float) -> float:
    """Return the tokens at which a (tokens, loss) line first reaches ``loss``, interpolated, or infinity."""
    if line and line[0][1] <= loss:
        return line[0][0]
    for (before, high), (after, low) in itertools.pairwise(line):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low)
    return math.inf


def too_few(seeds: Sequence[int]) -> str | None:
    """Return a sentence on missing intervals and tests, or None if there are enough seeds."""
    if len(seeds) >= MIN_SEEDS:
        return None
    found = count(len(seeds), "seed")
    return f"no intervals and no tests: they need at least {MIN_SEEDS} seeds, this run has {found}"


def interval_note(seeds: Sequence[int]) -> str:
    """Return the note below a table of estimates over seeds."""
    return too_few(seeds) or f"mean ± half width of the 95% t interval over {len(seeds)} seeds"


def seeds_caption(seeds: Sequence[int], bars: str) -> str:
    """Return the caption of a figure: the seeds, and the sentence ``bars`` on its intervals if there are any."""
    few = too_few(seeds)
    return f"Seeds {', '.join(map(str, seeds))}. {bars if few is None else f'{few}.'}"


def format_estimate(found: Estimate, digits: int = 4) -> str:
    """Format a mean with its half width, if there is one."""
    half = "" if found.half_width is None else f" ± {found.half_width:.{digits}f}"
    return f"{found.mean:.{digits}f}{half}"


def format_difference(found: Difference, digits: int = 4) -> str:
    """Format a difference with its sign and its half width, if there is one."""
    half = "" if found.half_width is None else f" ± {found.half_width:.{digits}f}"
    return f"{found.mean:+.{digits}f}{half}"


def format_p(p: float | None) -> str:
    return "-" if p is None else f"{p:.1g}" if p < 0.001 else f"{p:.3f}"
