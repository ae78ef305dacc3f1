"""Figures of the benchmarks."""

from __future__ import annotations

import itertools
import math

from benchmarks.lib.drawing import log_log


def test_the_end_of_every_line_is_labeled_and_no_labels_overlap():
    ends = [968, 995, 990, 821, 118, 91]
    figure = log_log({f"line {i}": {1024: 10, 2048: end} for i, end in enumerate(ends)}, "ms", "title")
    [axes] = figure.axes
    assert sorted(text.get_text() for text in axes.texts) == sorted(f" {end:.3g}" for end in ends)
    places = {text.get_text().strip(): text.xy[1] for text in axes.texts}
    order = [places[f"{end:.3g}"] for end in sorted(ends)]
    low, high = axes.get_ylim()
    apart = [math.log(b / a) / math.log(high / low) for a, b in itertools.pairwise(order)]
    assert min(apart) > 0.039  # in the order of the lines
    assert places["91"] < 100 and abs(math.log(places["968"] / 968)) < 0.3
