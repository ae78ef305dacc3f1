"""Replicas of a model in the test process, behind a gateway."""

from collections.abc import AsyncIterator
from contextlib import aclosing

from serve.gateway.backend import ReplicaLostError, call_app


class Replicas:
    """Replicas of an application. ``losses`` holds, per request, the messages after which its replica ends, or None."""

    def __init__(self, app, losses=()):
        self.app, self.losses, self.requests = app, list(losses), []

    async def respond(self, request, body, prefix=()) -> AsyncIterator[list[dict]]:
        self.requests.append((request, body, prefix))
        left = self.losses.pop(0) if self.losses else None
        async with aclosing(call_app(self.app, request, body)) as batches:
            async for batch in batches:
                for message in batch:
                    if left == 0:
                        raise ReplicaLostError("gone")
                    left = left and left - 1
                    yield [message]
