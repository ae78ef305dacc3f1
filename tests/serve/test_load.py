"""Load on a server in a process of its own: no error that a client did not cause, nothing left behind."""

import pytest

from benchmarks.lib.load import Report
from benchmarks.serving_load import load_server, save_random

KINDS = {
    "complete",
    "stream",
    "chat",
    "cancelled_stream",
    "cancelled_request",
    "early_disconnect",
    "slow_reader",
    "invalid",
}


def test_twenty_seconds_of_load(tmp_path) -> None:
    save_random(tmp_path / "model", "tiny", context=512)
    report, pages = load_server(tmp_path / "model", 20, clients=12, context=512)
    print(f"memory: {report.slope:+.2f} MiB per minute")
    assert report.errors == []
    assert pages == 0
    assert len(report.memory) > 3
    assert report.tokens > 0 and report.requests.total() >= 12


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ten_minutes_of_load(tmp_path) -> None:
    save_random(tmp_path / "model", "tiny")
    report, pages = load_server(tmp_path / "model", 600, clients=16)
    assert report.errors == []
    assert pages == 0
    assert set(report.requests) == KINDS
    assert report.slope < 1, report.memory


def test_the_slope_leaves_the_warm_up_out() -> None:
    warm_up = [(minute / 60, 100.0 + minute) for minute in range(30)]
    flat = [(minute / 60, 130.0) for minute in range(30, 90)]
    assert Report(memory=warm_up + flat).slope == pytest.approx(0)
    assert Report(memory=[(minute / 60, 2 * minute / 60) for minute in range(90)]).slope == pytest.approx(2)
    assert Report().slope == 0
