"""Forwarding of a training's events, on the driver, to MLflow and the terminal.

Two processes take part. Rank 0 puts events into the queue; the driver's thread drains it, logs each event and
acknowledges it. Before a checkpoint counts as written, rank 0 waits for the acknowledgment of its metrics. A run that
resumes from the checkpoint thus never has to repeat them.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import ray

from model.atomic_files import write_text
from pipelines.ray_runtime.event_queue import EventQueue, TrainEvent
from pipelines.reports.terminal import TrainingProgress
from pipelines.tracking.mlflow_store import TrackedRun

WALL_SECONDS = "train/wall_seconds"
"""Training time of a run over all its processes, each from its start to its last report."""
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds to wait before each retry of a request that MLflow failed."""


class EventForwarder:
    """Context manager that forwards events while it is open, and closes the queue once it is empty.

    An unreachable MLflow must neither end a training nor lose its metrics: after all retries, events go to the file
    ``unsent``, one per line, which the next forwarder sends first.
    """

    def __init__(self, queue: EventQueue, tracked: TrackedRun, progress: TrainingProgress, unsent: Path):
        self.error: Exception | None = None
        """Last error of MLflow after all retries."""
        self.kept = True
        """True if all unsent events are in the file."""
        self._queue, self._tracked, self._progress, self._unsent = queue, tracked, progress, unsent
        self._earlier_seconds, self._started = 0.0, 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._forward, daemon=True)

    def __enter__(self) -> EventForwarder:
        self._earlier_seconds, self._started = self._tracked.metrics().get(WALL_SECONDS, 0.0), time.monotonic()
        self._send_unsent()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._done.set()
        self._thread.join()
        self._queue.close()

    def _forward(self) -> None:
        while True:
            ending = self._done.is_set()
            try:
                events = self._queue.drain(0.2)
                for event in events:
                    self._handle(event)
                if events:
                    self._queue.acknowledge(len(events))
            except ray.exceptions.RayError:
                return  # the cluster is gone; the training's own error tells why
            if ending and not events:
                return

    def _handle(self, event: TrainEvent) -> None:
        if event.reported:
            event.metrics[WALL_SECONDS] = self._earlier_seconds + time.monotonic() - self._started
        if not self._send(event):
            try:
                self._unsent.parent.mkdir(parents=True, exist_ok=True)
                with self._unsent.open("a") as file:
                    file.write(_to_line(event))
            except OSError:  # e.g. a full disk
                self.kept = False
        with contextlib.suppress(OSError):  # a closed terminal
            if event.event is not None:
                self._progress.print_event(event.step, event.event)
            else:
                self._progress.update(event.step, event.metrics, event.reported)

    def _send_unsent(self) -> None:
        if not self._unsent.exists():
            return
        events: list[TrainEvent] = []
        for line in self._unsent.read_text().splitlines():
            with contextlib.suppress(ValueError, TypeError):  # an empty line, or one torn by a kill or a full disk
                events.append(TrainEvent(**json.loads(line)))
        while events and self._send(events[0]):
            events.pop(0)
        if events:
            write_text(self._unsent, "".join(map(_to_line, events)))
        else:
            self._unsent.unlink()

    def _send(self, event: TrainEvent) -> bool:
        error = try_log(event, self._tracked, () if self.error else RETRY_DELAYS)  # retries only for the first failure
        self.error = error or self.error
        return error is None


def _to_line(event: TrainEvent) -> str:
    return "\n" + json.dumps(asdict(event))  # the line before may be torn


def try_log(event: TrainEvent, tracked: TrackedRun, delays: Iterable[float] = RETRY_DELAYS) -> Exception | None:
    """Log an event to MLflow, with a retry after each delay in seconds. Return the last error, or None on success."""
    error = None
    for delay in (0.0, *delays):
        time.sleep(delay)
        try:
            if event.resumed:
                tracked.skip_repeated(event.step)
            tracked.log_step(event.metrics, event.step)
            if event.tags:
                tracked.set_tags(event.tags)
            if event.event is not None:
                tracked.log_event(event.step, event.event)
            return None
        except Exception as failure:  # MLflow lets the errors of its store's drivers through
            error = failure
    return error
