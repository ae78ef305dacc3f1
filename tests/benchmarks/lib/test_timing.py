"""The clocks and gauges that the benchmarks share."""

import time

import pytest
import torch

from benchmarks.lib.timing import PeakMemory, Side, Timing, bandwidth, fastest, hopeless, in_child, in_turn, ratio


def test_sides_run_in_turn_on_their_threads():
    seen = []
    sides = {
        name: Side(lambda name=name: seen.append((name, torch.get_num_threads())), threads)
        for name, threads in (("a", 1), ("b", 2))
    }
    times = in_turn(sides, 3)
    assert seen == [("a", 1), ("b", 2)] * 4  # one round more than is counted
    assert all(len(timing.rounds) == 3 for timing in times.values())
    torch.set_num_threads(1)


def test_time_is_per_unit_and_the_ratio_is_that_of_the_rounds():
    sides = {
        "slow": Side(lambda: time.sleep(0.04), 1, units=2),
        "fast": Side(lambda: time.sleep(0.02), 1, units=4),
    }
    times = in_turn(sides, 3)
    assert times["slow"].median == pytest.approx(0.02, rel=0.5)
    assert ratio(times["slow"], times["fast"]) == pytest.approx(4, rel=0.3)
    assert fastest(times) == "fast"
    assert hopeless(times) == {"slow"} and not hopeless({"a": Timing([2.0]), "b": Timing([3.0])})


def touch(mebibytes: int) -> tuple[int, int]:
    kept = torch.ones(mebibytes, 1 << 18)
    del kept  # an earlier peak, which must not count
    with PeakMemory() as memory:
        torch.ones(16, 1 << 18)
    return memory.before, memory.extra


def test_peak_memory_of_a_child_is_what_it_used_inside_the_block():
    before, extra = in_child(touch, 256)
    assert 15 << 20 < extra < 40 << 20
    assert before < 2 << 30


def test_what_a_stream_delivers():
    assert 1e9 < bandwidth(1, rounds=1) < 1e13


def test_rates_and_seconds_have_a_spread():
    timing = Timing([0.5, 0.25, 0.2])
    assert timing.milliseconds() == "250 (200-500)"
    assert timing.seconds() == "0.25 (0.20-0.50)"
    assert timing.per_second() == "4 (2-5)"
