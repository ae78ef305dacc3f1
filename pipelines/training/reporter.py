"""The interface through which a training reports metrics, events and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

WriteCheckpoint = Callable[[Path], None]
"""Writes this rank's share of a checkpoint into an existing folder, which is complete once every rank's is written."""


class Reporter(Protocol):
    """Receiver of a training's reports. Called on every rank at equal steps."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of the step just made."""

    def resumed(self, step: int) -> None:
        """Record that training resumed from the checkpoint of ``step``. Steps recorded after that checkpoint are
        repeated with equal values."""

    def log_event(self, step: int, message: str) -> None:
        """Record an event that a person should see, such as a rollback."""

    def report(self, step: int, metrics: dict[str, float], write: WriteCheckpoint | None) -> None:
        """Record validation metrics, empty if none were due, and a checkpoint.

        ``write`` is None if no checkpoint is due or this rank has no share of it.
        """
