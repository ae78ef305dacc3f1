"""The driver's side of a training's news: out of the mailbox, into MLflow and onto the terminal."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

import pipelines.ray_runtime.session  # noqa: F401  (sets Ray's environment before ray is imported)

# isort: split
import ray

from model.files import write_text
from pipelines.ray_runtime.event_queue import Mailbox
from pipelines.reports.terminal import TrainingProgress
from pipelines.tracking.mlflow_store import TrackedRun

WALL_SECONDS = "train/wall_seconds"
"""How long a run has trained, in all its processes, each from its beginning to its last report."""
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before MLflow is asked once more to take what it refused."""


@dataclass(frozen=True)
class News:
    """What rank 0 tells the driver: metrics of a step, or in a sentence what happened at it."""

    step: int
    metrics: dict[str, float]
    reported: bool = False
    event: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the MLflow run."""


class Listener:
    """Context manager that carries news while it is open, and closes the mailbox once that is empty.

    What MLflow does not take, asked again for a while, must not end a training, nor be lost: it stays in the file
    ``unsent``, a line each, which the next listener sends before anything else.
    """

    def __init__(self, mailbox: Mailbox, tracked: TrackedRun, progress: TrainingProgress, unsent: Path):
        self.refusal: Exception | None = None
        """Why MLflow did not take something that it was offered."""
        self.kept = True
        """Whether all that it did not take is in the file."""
        self._mailbox, self._tracked, self._progress, self._unsent = mailbox, tracked, progress, unsent
        self._earlier, self._started = 0.0, 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Listener:
        self._earlier, self._started = self._tracked.metrics().get(WALL_SECONDS, 0.0), time.monotonic()
        self._send_what_was_left()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._done.set()
        self._thread.join()
        self._mailbox.close()

    def _listen(self) -> None:
        while True:
            ending = self._done.is_set()
            try:
                taken = self._mailbox.take(0.2)
                for news in (News(**item) for item in taken):
                    self._hear(news)
                if taken:
                    self._mailbox.acknowledge(len(taken))
            except ray.exceptions.RayError:
                return  # the cluster went away; the training's own error says why
            if ending and not taken:
                return

    def _hear(self, news: News) -> None:
        if news.reported:
            news.metrics[WALL_SECONDS] = self._earlier + time.monotonic() - self._started
        if not self._sent(news):
            try:
                self._unsent.parent.mkdir(parents=True, exist_ok=True)
                with self._unsent.open("a") as file:
                    file.write(_line(news))
            except OSError:  # a full disk
                self.kept = False
        with contextlib.suppress(OSError):  # a closed terminal
            if news.event is not None:
                self._progress.tell(news.step, news.event)
            else:
                self._progress.update(news.step, news.metrics, news.reported)

    def _send_what_was_left(self) -> None:
        if not self._unsent.exists():
            return
        kept: list[News] = []
        for line in self._unsent.read_text().splitlines():
            with contextlib.suppress(ValueError, TypeError):  # an empty or a half line: a killed process, a full disk
                kept.append(News(**json.loads(line)))
        while kept and self._sent(kept[0]):
            kept.pop(0)
        if kept:
            write_text(self._unsent, "".join(map(_line, kept)))
        else:
            self._unsent.unlink()

    def _sent(self, news: News) -> bool:
        refusal = refused(news, self._tracked, () if self.refusal else PAUSES)  # what is gone holds nobody up twice
        self.refusal = refusal or self.refusal
        return refusal is None


def _line(news: News) -> str:
    return "\n" + json.dumps(asdict(news))  # after what may be half a line


def refused(news: News, tracked: TrackedRun, pauses: Iterable[float] = PAUSES) -> Exception | None:
    """Tell MLflow, again after each of the pauses (seconds) where it takes nothing. Returns why not in the end."""
    refusal = None
    for pause in (0.0, *pauses):
        time.sleep(pause)
        try:
            tracked.log_metrics(news.metrics, news.step)
            if news.tags:
                tracked.set_tags(news.tags)
            if news.event is not None:
                tracked.tell(news.step, news.event)
            return None
        except Exception as error:  # MLflow lets the errors of its store's drivers through
            refusal = error
    return refusal
