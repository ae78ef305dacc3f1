"""Choice of a replica: the one that has read the longest beginning of the prompt, unless it is much busier.

Ray's own ``PrefixCacheAffinityRouter`` (ray.llm) asks an actor before and after every request, with blocking calls in
the event loop. This router keeps a table in the gateway instead.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

TABLE_SIZE = 1 << 16
"""Digests that are remembered; each prompt has about two per doubling of its length."""


class PrefixTable:
    """Table from the digest of a prompt's beginning to the replica that was sent such a prompt, with the least recently
    used entries over ``size`` dropped."""

    def __init__(self, size: int = TABLE_SIZE) -> None:
        self._size = size
        self._holders: OrderedDict[bytes, ReplicaID] = OrderedDict()

    def find(self, prefix: Sequence[bytes], available: set[ReplicaID]) -> ReplicaID | None:
        """Return the available replica with the longest beginning in common, if any."""
        for digest in reversed(prefix):
            if self._holders.get(digest) in available:
                return self._holders[digest]
        return None

    def record(self, prefix: Sequence[bytes], replica: ReplicaID) -> None:
        """Record that a prompt was sent to a replica. Beginnings that other replicas hold stay with them, except the
        longest one."""
        for index, digest in enumerate(prefix):
            if index == len(prefix) - 1 or digest not in self._holders:
                self._holders[digest] = replica
            self._holders.move_to_end(digest)
        while len(self._holders) > self._size:
            self._holders.popitem(last=False)

    def retain(self, replicas: Collection[ReplicaID]) -> None:
        """Drop the entries of all replicas but these."""
        self._holders = OrderedDict((digest, id) for digest, id in self._holders.items() if id in replicas)


class PrefixRouter(RequestRouter):
    """Request router of Ray Serve that prefers the replica holding the prompt's prefix.

    A replica with ``imbalance`` more requests than the least busy one is not preferred. Then, and for new prompts, the
    less busy of two random replicas is chosen, as by Ray Serve's default. Counts and table are those of one gateway.
    """

    def initialize_state(self, imbalance: int = 16, **_: Any) -> None:
        self._imbalance = imbalance
        self._table = PrefixTable()
        self._active: Counter[ReplicaID] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        if not replicas:
            return []
        ranks = [random.sample(list(replicas.values()), min(2, len(replicas)))]
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            if (holder := self.holder(_prefix(pending_request), set(replicas))) is not None:
                ranks.insert(0, [replicas[holder]])
        return ranks

    def holder(self, prefix: Sequence[bytes], available: set[ReplicaID]) -> ReplicaID | None:
        """Return the replica that holds the prefix, or None if none does or it is too busy."""
        found = self._table.find(prefix, available)
        least = min(self._active[replica] for replica in available)
        return None if found is None or self._active[found] - least > self._imbalance else found

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._table.retain({replica.replica_id for replica in replicas})

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._table.record(_prefix(pending_request), replica_id)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._active[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Ray Serve calls this once for every request sent, also for one that the replica has refused."""
        self._active[replica_id] -= 1
        if self._active[replica_id] <= 0:
            del self._active[replica_id]


def _prefix(request: PendingRequest) -> Sequence[bytes]:
    return request.kwargs.get("prefix", ())
