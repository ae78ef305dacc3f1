"""What the workers of a training tell its driver, and the driver's word that it has dealt with it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pipelines.ray_runtime.session  # noqa: F401  (sets Ray's environment before ray is imported)

# isort: split
import ray


class Mailbox:
    """Any number of senders, one receiver; ends with the driver that opened it. Items are plain values, as in JSON.

    Every method raises a RayError once the mailbox is closed, its driver is gone or the cluster is.
    """

    def __init__(self) -> None:
        self._actor: Any = ray.remote(num_cpus=0)(_Box).remote()

    def put(self, item: Any) -> int:
        """Send; returns the item's number, for :meth:`wait`."""
        return ray.get(self._actor.put.remote(json.dumps(item)))

    def take(self, seconds: float) -> list[Any]:
        """All that was sent and not yet taken, in order; empty when nothing comes within ``seconds``."""
        return [json.loads(text) for text in ray.get(self._actor.take.remote(seconds))]

    def acknowledge(self, count: int) -> None:
        """The receiver has dealt with the next ``count`` items that it took."""
        ray.get(self._actor.acknowledge.remote(count))

    def wait(self, number: int) -> None:
        """Until the receiver has acknowledged the item ``number`` and all before it."""
        ray.get(self._actor.wait.remote(number))

    def end(self, why: str) -> None:
        """Leave word that the training is over, however often Ray Train starts its workers again."""
        ray.get(self._actor.end.remote(why))

    def ended(self) -> str | None:
        """Why, if it is."""
        return ray.get(self._actor.ended.remote())

    def close(self) -> None:
        ray.kill(self._actor)


class _Box:
    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.sent = self.acknowledged = 0
        self.changed = asyncio.Condition()
        self.why: str | None = None

    async def put(self, text: str) -> int:
        async with self.changed:
            self.waiting.append(text)
            self.sent += 1
            self.changed.notify_all()
            return self.sent

    async def take(self, seconds: float) -> list[str]:
        async with self.changed:
            try:
                await asyncio.wait_for(self.changed.wait_for(lambda: self.waiting), seconds)
            except TimeoutError:
                return []
            taken, self.waiting = self.waiting, []
            return taken

    async def acknowledge(self, count: int) -> None:
        async with self.changed:
            self.acknowledged += count
            self.changed.notify_all()

    async def end(self, why: str) -> None:
        self.why = self.why or why

    async def ended(self) -> str | None:
        return self.why

    async def wait(self, number: int) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.acknowledged >= number)
