"""What the benchmarks share."""

import time

import pytest
import torch

from benchmarks.drawing import log_log
from benchmarks.report import BEGIN, END, command_line, table, verdict, write_tables
from benchmarks.timing import OtherLoad, PeakMemory, Side, Timing, fastest, hopeless, in_child, in_turn, machine, ratio
from model.errors import FiftyfoldError


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


def test_the_machine_is_named_by_its_parts_only():
    import socket

    assert "cores" in machine() and "torch" in machine()
    assert socket.gethostname() not in machine()
    assert 0 <= OtherLoad().share() <= 1


def test_a_table_goes_between_its_markers_and_nowhere_else(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_tables(path, table(["a", "b"], [(1, verdict(3.0, 3.0))]))
    assert path.read_text() == f"before\n{BEGIN}\n| a | b |\n| --- | --- |\n| 1 | 3: met |\n{END}\nafter\n"
    path.write_text("no place for one")
    with pytest.raises(FiftyfoldError, match=r"page\.md"):
        write_tables(path, "text")
    assert path.read_text() == "no place for one"


def test_a_mistake_ends_a_script_with_one_sentence():
    def main() -> str:
        raise FiftyfoldError("it is wrong")

    with pytest.raises(SystemExit, match="error: it is wrong"):
        command_line(main)


def test_a_figure_is_drawn(tmp_path):
    log_log(tmp_path / "figure.png", {"a": {1024: 1.0, 4096: 2.0}}, "ms", "title")
    assert (tmp_path / "figure.png").stat().st_size > 1000
