"""Queue of events from the workers of a training to its driver, with acknowledgments."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import ray


@dataclass(frozen=True)
class TrainEvent:
    """Metrics of a step, or a message about it, from rank 0 to the driver."""

    step: int
    metrics: dict[str, float]
    reported: bool = False
    """True for metrics of a validation or checkpoint."""
    event: str | None = None
    """A sentence for the terminal and MLflow."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the MLflow run."""
    resumed: bool = False
    """True if training resumed from the checkpoint of ``step``."""

    @classmethod
    def resumption(cls, step: int) -> TrainEvent:
        """Return the event of a training that goes on from the checkpoint of ``step``."""
        return cls(step, {}, event="resumed from the last checkpoint", resumed=True)


class EventQueue:
    """Queue with many senders and one receiver, owned by the driver that opened it.

    Every method raises a RayError once the queue is closed or its driver or cluster is gone.
    """

    def __init__(self) -> None:
        self._actor: Any = ray.remote(num_cpus=0)(_QueueActor).remote()

    def put(self, event: TrainEvent) -> int:
        """Send an event; return its number, for :meth:`wait_acknowledged`."""
        return ray.get(self._actor.put.remote(json.dumps(asdict(event))))

    def drain(self, timeout: float) -> list[TrainEvent]:
        """Return all pending events in order; wait up to ``timeout`` seconds for the first."""
        return [TrainEvent(**json.loads(text)) for text in ray.get(self._actor.drain.remote(timeout))]

    def acknowledge(self, count: int) -> None:
        """Mark the next ``count`` drained events as handled."""
        ray.get(self._actor.acknowledge.remote(count))

    def wait_acknowledged(self, number: int) -> None:
        """Wait until event ``number`` and all before it are handled."""
        ray.get(self._actor.wait_acknowledged.remote(number))

    def abort(self, reason: str) -> None:
        """End the training for good: workers that Ray Train restarts must stop with ``reason``."""
        ray.get(self._actor.abort.remote(reason))

    def abort_reason(self) -> str | None:
        """Return the reason of the first :meth:`abort`, or None."""
        return ray.get(self._actor.abort_reason.remote())

    def close(self) -> None:
        """Kill the queue's actor."""
        ray.kill(self._actor)


class _QueueActor:
    def __init__(self) -> None:
        self.pending: list[str] = []
        self.sent = self.acknowledged = 0
        self.changed = asyncio.Condition()
        self.reason: str | None = None

    async def put(self, text: str) -> int:
        async with self.changed:
            self.pending.append(text)
            self.sent += 1
            self.changed.notify_all()
            return self.sent

    async def drain(self, timeout: float) -> list[str]:
        async with self.changed:
            try:
                await asyncio.wait_for(self.changed.wait_for(lambda: self.pending), timeout)
            except TimeoutError:
                return []
            drained, self.pending = self.pending, []
            return drained

    async def acknowledge(self, count: int) -> None:
        async with self.changed:
            self.acknowledged += count
            self.changed.notify_all()

    async def wait_acknowledged(self, number: int) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.acknowledged >= number)

    async def abort(self, reason: str) -> None:
        self.reason = self.reason or reason

    async def abort_reason(self) -> str | None:
        return self.reason
