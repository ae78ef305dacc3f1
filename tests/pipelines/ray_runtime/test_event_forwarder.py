"""Forwarding of events to the terminal and a real tracking store, at once or at the next start."""

import json
from types import SimpleNamespace

import pytest

from pipelines.ray_runtime import event_forwarder
from pipelines.ray_runtime.event_forwarder import WALL_SECONDS, EventForwarder
from pipelines.ray_runtime.event_queue import TrainEvent
from pipelines.reports.terminal import TrainingProgress
from pipelines.tracking.mlflow_store import TrackedRun, open_tracking

MESSAGE = "the loss spiked from 2.000 to 9.000: rolled back to step 4 (intervention 1 of 3)"


class Queue:
    """A queue with some events."""

    def __init__(self, *events):
        self.events, self.acknowledged = list(events), 0

    def drain(self, timeout):
        taken, self.events = self.events, []
        return taken

    def acknowledge(self, count):
        self.acknowledged += count

    def close(self):
        pass


@pytest.fixture
def pauses(monkeypatch):
    """Record the delays between retries instead of waiting."""
    asked = []
    clock = SimpleNamespace(sleep=lambda seconds: seconds and asked.append(seconds), monotonic=lambda: 40.0)
    monkeypatch.setattr(event_forwarder, "time", clock)
    return asked


@pytest.fixture
def forward(prepared, tmp_path, pauses):
    """Forward events; return the forwarder, the number acknowledged, and the MLflow run."""
    tracking = open_tracking(prepared)
    run_id = tracking.start_run("watched", kind="train", recipe=prepared).run_id

    def forward(*events):
        tracked, queue = tracking.start_run("watched", kind="train", recipe=prepared, run_id=run_id), Queue(*events)
        with EventForwarder(queue, tracked, TrainingProgress("watched", 10), tmp_path / "unsent.jsonl") as forwarder:
            pass
        return forwarder, queue.acknowledged, tracking.client.get_run(run_id)

    return forward


def test_events_are_printed_and_logged(forward, capsys, pauses, tmp_path):
    forwarder, acknowledged, run = forward(TrainEvent(6, {"train/loss": 9.0}), TrainEvent(6, {}, event=MESSAGE))
    assert f"watched: step 6: {MESSAGE}\n" in capsys.readouterr().out
    assert run.data.tags["event.000006"] == MESSAGE and run.data.metrics["train/loss"] == 9.0
    assert forwarder.error is None and acknowledged == 2 and not pauses and not list(tmp_path.iterdir())


def test_a_failing_store_is_retried(forward, pauses, monkeypatch):
    asked, log = [], TrackedRun.log_metrics
    monkeypatch.setattr(TrackedRun, "log_metrics", lambda *a: log(*a) if asked.append(0) or len(asked) == 3 else 1 / 0)
    forwarder, _, run = forward(TrainEvent(7, {"train/loss": 3.0}))
    assert forwarder.error is None and pauses == [0.5, 1.0] and run.data.metrics["train/loss"] == 3.0


def test_unsent_events_are_sent_at_the_next_start(prepared, forward, pauses, tmp_path, monkeypatch):
    with monkeypatch.context() as gone:
        gone.setattr(TrackedRun, "log_metrics", lambda *a: 1 / 0)
        forwarder, acknowledged, run = forward(
            TrainEvent(7, {"train/loss": 2.0}), TrainEvent(8, {}, event=MESSAGE), TrainEvent(9, {"train/loss": 4.0})
        )
        # The training goes on, and only the first event is retried.
        assert isinstance(forwarder.error, ZeroDivisionError) and acknowledged == 3
        assert pauses == list(event_forwarder.RETRY_DELAYS) and not run.data.metrics
        forward()
    assert forwarder.kept
    kept = (tmp_path / "unsent.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept if line] == [7, 8, 9]
    with (tmp_path / "unsent.jsonl").open("a") as file:
        file.write('\n{"step": 9, "met')  # torn by a kill
    forwarder, _, run = forward(TrainEvent(10, {"train/loss": 5.0}))
    assert forwarder.error is None and not (tmp_path / "unsent.jsonl").exists()
    assert run.data.metrics["train/loss"] == 5.0 and run.data.tags["event.000008"] == MESSAGE
    history = open_tracking(prepared).client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(7, 2.0), (9, 4.0), (10, 5.0)]


def test_steps_that_a_resumed_training_repeats_are_logged_once(prepared, forward, capsys, pauses):
    def steps(*numbers, loss=1.0):
        return [TrainEvent(step, {"train/loss": loss * step, "train/step_seconds": loss}) for step in numbers]

    forward(*steps(5, 6, 7, 8))  # killed after the checkpoint of step 6
    validation = TrainEvent(8, {"validation/loss": 1.0}, reported=True)
    rollback = steps(8, 9, loss=3.0)
    _, _, run = forward(TrainEvent.resumption(6), *steps(7, 8), validation, *steps(9, 10), *rollback)
    assert capsys.readouterr().out.count("watched: step 6: resumed from the last checkpoint\n") == 1
    assert (
        run.data.tags["event.000006"] == "resumed from the last checkpoint"
        and run.data.metrics["validation/loss"] == 1.0
    )
    client = open_tracking(prepared).client
    expected = [(5, 5.0), (6, 6.0), (7, 7.0), (8, 8.0), (9, 9.0), (10, 10.0), (8, 24.0), (9, 27.0)]
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == sorted(expected)
    assert len(client.get_metric_history(run.info.run_id, "train/step_seconds")) == len(expected)
    # Workers that restart within one process repeat steps, too.
    _, _, run = forward(*steps(11, 12), TrainEvent.resumption(10), *steps(11, 12, 13))
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(point.step for point in history if point.step > 10) == [11, 12, 13]


def history_of(prepared, run):
    """Return the logged (step, value) of the training loss, in order."""
    history = open_tracking(prepared).client.get_metric_history(run.info.run_id, "train/loss")
    return sorted((point.step, point.value) for point in history)


def test_a_run_killed_after_a_rollback_repeats_both_passes(prepared, forward, pauses):
    def steps(*numbers, loss):
        return [TrainEvent(step, {"train/loss": loss}) for step in numbers]

    first, second = steps(*range(5, 9), loss=9.0), steps(5, 6, loss=1.0)
    forward(*first, *second)  # rolled back to step 4, killed after step 6
    _, _, run = forward(TrainEvent.resumption(4), *first, *second, *steps(7, 8, loss=1.0))
    expected = [(step, loss) for step in range(5, 9) for loss in (1.0, 9.0)]
    assert history_of(prepared, run) == expected


def test_unsent_steps_after_a_resumption_are_not_taken_for_repeats(prepared, forward, pauses, monkeypatch):
    forward(TrainEvent(7, {"train/loss": 7.0}))
    with monkeypatch.context() as gone:
        gone.setattr(TrackedRun, "log_metrics", lambda *a: 1 / 0)
        forward(TrainEvent.resumption(6), *(TrainEvent(step, {"train/loss": float(step)}) for step in (7, 8, 9)))
    with monkeypatch.context() as back:  # MLflow answers again before the unsent events are sent
        back.setattr(EventForwarder, "_send_unsent", lambda self: None)
        forward(TrainEvent(10, {"train/loss": 10.0}))
    _, _, run = forward()
    assert history_of(prepared, run) == [(step, float(step)) for step in (7, 8, 9, 10)]


def test_lost_events_are_known(forward, pauses, tmp_path, monkeypatch):
    (tmp_path / "unsent.jsonl").mkdir()  # so that writing fails
    monkeypatch.setattr(EventForwarder, "_send_unsent", lambda self: None)
    monkeypatch.setattr(TrackedRun, "log_metrics", lambda *a: 1 / 0)
    forwarder, acknowledged, _ = forward(TrainEvent(7, {"train/loss": 2.0}))
    assert forwarder.error is not None and not forwarder.kept and acknowledged == 1


def test_wall_time_covers_all_processes(forward, pauses, monkeypatch):
    times = iter([100.0, 130.0, 500.0, 507.0])
    monkeypatch.setattr(event_forwarder.time, "monotonic", lambda: next(times))
    assert forward(TrainEvent(2, {}, reported=True))[2].data.metrics[WALL_SECONDS] == 30.0
    assert forward(TrainEvent(3, {}, reported=True))[2].data.metrics[WALL_SECONDS] == 37.0
