"""What a training tells reaches the terminal and a real tracking store, at once or at the next start."""

import json
from types import SimpleNamespace

import pytest

from pipelines.ray_runtime import event_forwarder
from pipelines.ray_runtime.event_forwarder import WALL_SECONDS, EventForwarder
from pipelines.ray_runtime.event_queue import TrainEvent
from pipelines.reports.terminal import TrainingProgress
from pipelines.tracking.mlflow_store import TrackedRun, open_tracking

WHAT = "the loss leapt from 2.000 to 9.000: back to step 4 (intervention 1 of 3)"


class Letters:
    """A mailbox that holds some news, and then nothing."""

    def __init__(self, *news):
        self.news, self.acknowledged = list(news), 0

    def drain(self, timeout):
        taken, self.news = self.news, []
        return taken

    def acknowledge(self, count):
        self.acknowledged += count

    def close(self):
        pass


@pytest.fixture
def pauses(monkeypatch):
    """Those between one asking and the next, without the waiting."""
    asked = []
    clock = SimpleNamespace(sleep=lambda seconds: seconds and asked.append(seconds), monotonic=lambda: 40.0)
    monkeypatch.setattr(event_forwarder, "time", clock)
    return asked


@pytest.fixture
def hear(prepared, tmp_path, pauses):
    """Hear news to their end; returns the forwarder, how many were dealt with, and the MLflow run."""
    tracking = open_tracking(prepared)
    run_id = tracking.start_run("watched", kind="train", recipe=prepared).run_id

    def hear(*news):
        tracked, letters = tracking.start_run("watched", kind="train", recipe=prepared, run_id=run_id), Letters(*news)
        with EventForwarder(letters, tracked, TrainingProgress("watched", 10), tmp_path / "unsent.jsonl") as ear:
            pass
        return ear, letters.acknowledged, tracking.client.get_run(run_id)

    return hear


def test_news_are_seen_and_kept(hear, capsys, pauses, tmp_path):
    ear, dealt_with, run = hear(TrainEvent(6, {"train/loss": 9.0}), TrainEvent(6, {}, event=WHAT))
    assert f"watched: step 6: {WHAT}\n" in capsys.readouterr().out
    assert run.data.tags["event.000006"] == WHAT and run.data.metrics["train/loss"] == 9.0
    assert ear.error is None and dealt_with == 2 and not pauses and not list(tmp_path.iterdir())


def test_a_store_that_refuses_for_a_while_is_asked_again(hear, pauses, monkeypatch):
    asked, log = [], TrackedRun.log_metrics
    monkeypatch.setattr(TrackedRun, "log_metrics", lambda *a: log(*a) if asked.append(0) or len(asked) == 3 else 1 / 0)
    ear, _, run = hear(TrainEvent(7, {"train/loss": 3.0}))
    assert ear.error is None and pauses == [0.5, 1.0] and run.data.metrics["train/loss"] == 3.0


def test_what_a_store_does_not_take_is_sent_at_the_next_start(prepared, hear, pauses, tmp_path, monkeypatch):
    with monkeypatch.context() as gone:
        gone.setattr(TrackedRun, "log_metrics", lambda *a: 1 / 0)
        ear, dealt_with, run = hear(
            TrainEvent(7, {"train/loss": 2.0}), TrainEvent(8, {}, event=WHAT), TrainEvent(9, {"train/loss": 4.0})
        )
        # It ends no training and keeps no checkpoint waiting; the first only is offered again.
        assert isinstance(ear.error, ZeroDivisionError) and dealt_with == 3
        assert pauses == list(event_forwarder.RETRY_DELAYS) and not run.data.metrics
        hear()
    assert ear.kept
    kept = (tmp_path / "unsent.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept if line] == [7, 8, 9]
    with (tmp_path / "unsent.jsonl").open("a") as file:
        file.write('\n{"step": 9, "met')  # a process that was killed
    ear, _, run = hear(TrainEvent(10, {"train/loss": 5.0}))
    assert ear.error is None and not (tmp_path / "unsent.jsonl").exists()
    assert run.data.metrics["train/loss"] == 5.0 and run.data.tags["event.000008"] == WHAT
    history = open_tracking(prepared).client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(7, 2.0), (9, 4.0), (10, 5.0)]


def test_what_cannot_be_kept_either_is_known(hear, pauses, tmp_path, monkeypatch):
    (tmp_path / "unsent.jsonl").mkdir()  # so that writing fails
    monkeypatch.setattr(EventForwarder, "_send_unsent", lambda self: None)
    monkeypatch.setattr(TrackedRun, "log_metrics", lambda *a: 1 / 0)
    ear, dealt_with, _ = hear(TrainEvent(7, {"train/loss": 2.0}))
    assert ear.error is not None and not ear.kept and dealt_with == 1


def test_the_time_of_all_processes_counts(hear, pauses, monkeypatch):
    times = iter([100.0, 130.0, 500.0, 507.0])
    monkeypatch.setattr(event_forwarder.time, "monotonic", lambda: next(times))
    assert hear(TrainEvent(2, {}, reported=True))[2].data.metrics[WALL_SECONDS] == 30.0
    assert hear(TrainEvent(3, {}, reported=True))[2].data.metrics[WALL_SECONDS] == 37.0
