"""Interleaved timing, peak memory, and memory bandwidth."""

import torch

from benchmarks.lib.timing import (
    PeakMemory,
    Timer,
    Timing,
    fastest,
    memory_bandwidth,
    run_in_subprocess,
    speedup,
    time_interleaved,
    too_slow,
)


def test_timers_are_interleaved_with_their_thread_counts():
    seen = []
    timers = {
        name: Timer(lambda name=name: seen.append((name, torch.get_num_threads())), threads)
        for name, threads in (("a", 1), ("b", 2))
    }
    times = time_interleaved(timers, 3)
    assert seen == [("a", 1), ("b", 2)] * 4  # a warm-up round and three timed ones
    assert all(len(timing.rounds) == 3 for timing in times.values())
    torch.set_num_threads(1)


def test_time_is_per_unit_and_speedup_is_per_round(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("benchmarks.lib.timing.time.perf_counter", lambda: now[0])

    def takes(seconds):
        def run():
            now[0] += seconds

        return run

    timers = {"slow": Timer(takes(4.0), 1, units=2), "fast": Timer(takes(2.0), 1, units=4)}
    times = time_interleaved(timers, 3)
    assert times["slow"].median == 2.0
    assert speedup(times["slow"], times["fast"]) == 4.0
    assert fastest(times) == "fast"
    assert too_slow(times) == {"slow"} and not too_slow({"a": Timing([2.0]), "b": Timing([3.0])})


def touch(mebibytes: int) -> tuple[int, int]:
    unrelated = torch.ones(mebibytes, 1 << 18)
    del unrelated  # an earlier peak must not count
    with PeakMemory() as memory:
        torch.ones(16, 1 << 18)
    return memory.before, memory.extra


def test_peak_memory_counts_the_block_only():
    before, extra = run_in_subprocess(touch, 256)
    assert 15 << 20 < extra < 40 << 20
    assert before < 2 << 30


def test_memory_bandwidth():
    assert 1e9 < memory_bandwidth(1, rounds=1) < 1e13


def test_timings_are_formatted_with_their_range():
    timing = Timing([0.5, 0.25, 0.2])
    assert timing.milliseconds() == "250 (200-500)"
    assert Timing([0.9994, 1.0004, 12.3456]).milliseconds() == "1,000 (999-12,346)"
    assert timing.seconds() == "0.25 (0.20-0.50)"
    assert timing.per_second() == "4 (2-5)"
