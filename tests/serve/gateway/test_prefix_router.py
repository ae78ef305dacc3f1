"""The router prefers the replica that holds the prompt's beginning."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest
from ray.serve.request_router import PendingRequest, RequestRouter

from serve.gateway.prefixes import prefix_digests
from serve.gateway.router import PrefixRouter, PrefixTable

SYSTEM = b"You are a helpful assistant. " * 20


class Routed(PrefixRouter):
    """A router without Ray Serve around it, over replicas named by letters."""

    def __init__(self, replicas: str, imbalance: int = 4):
        self.initialize_state(imbalance=imbalance)
        self._use_replica_queue_len_cache = False
        self.replicas = [SimpleNamespace(replica_id=name) for name in replicas]

    def route(self, prompt: bytes) -> str:
        """Route a request to the first replica of the first rank, as Ray Serve does with equal queues."""

        async def main() -> str:
            request = PendingRequest([], {"prefix": prefix_digests(prompt)}, metadata=None)
            ranks = await self.choose_replicas(self.replicas, request)
            assert request.routing_context.should_backoff
            chosen = ranks[0][0].replica_id
            self.on_send_request(chosen)
            self.on_request_routed(request, chosen, None)
            return chosen

        return asyncio.run(main())


def test_a_prompt_follows_the_longest_beginning() -> None:
    table = PrefixTable()
    first, second = SYSTEM + b"a" * 900, SYSTEM + b"b" * 900
    table.record(prefix_digests(first), "A")
    table.record(prefix_digests(second), "B")
    for prompt, holder in (
        (first + b"more", "A"),
        (second + b"more", "B"),
        (SYSTEM + b"c" * 900, "A"),
        (b"x" * 999, None),
    ):
        assert table.find(prefix_digests(prompt), {"A", "B"}) == holder
    assert table.find(prefix_digests(first), {"B"}) is None or table.find(prefix_digests(first), {"B"}) == "B"
    table.retain({"B"})
    assert table.find(prefix_digests(first + b"more"), {"A", "B"}) in (None, "B")


def test_the_table_forgets_the_least_recently_used_beginnings() -> None:
    table = PrefixTable(size=8)
    for i in range(50):
        table.record(prefix_digests(b"%d" % i * 300), f"replica {i}")
    assert len(table._holders) == 8
    assert table.find(prefix_digests(b"49" * 300), {"replica 49"}) == "replica 49"


@pytest.mark.parametrize("replicas", ["AB", "ABCDE"])
def test_requests_with_a_common_beginning_share_a_replica(replicas) -> None:
    for i in range(20):  # by chance, they would not
        router = Routed(replicas, imbalance=100)
        prompts = [SYSTEM + b"question %d" % i + b"?" * 500 for i in range(8)]
        assert len({router.route(prompt) for prompt in prompts}) == 1


def test_new_prompts_spread() -> None:
    router = Routed("AB", imbalance=1000)
    chosen = Counter(router.route(b"%d " % i * 200) for i in range(200))
    assert min(chosen.values()) > 50


def test_a_busy_holder_is_not_preferred() -> None:
    router = Routed("AB", imbalance=4)
    holder = router.route(SYSTEM)
    for _ in range(4):
        assert router.route(SYSTEM) == holder
    available = {"A", "B"}
    assert router.holder(prefix_digests(SYSTEM), available) is None
    for _ in range(5):
        router.on_request_completed(holder, "id")
    assert router.holder(prefix_digests(SYSTEM), available) == holder
    assert not router._active


def test_replaced_replicas_are_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(RequestRouter, "update_replicas", lambda *_: None)
    router = Routed("AB", imbalance=100)
    router.route(SYSTEM)
    router.replicas = [SimpleNamespace(replica_id=name) for name in "CD"]
    router.update_replicas(router.replicas)
    assert len({router.route(SYSTEM + b"%d" % i * 500) for i in range(8)}) == 1


def test_without_replicas_there_is_no_choice() -> None:
    assert asyncio.run(Routed("").choose_replicas([], None)) == []
    ranks = asyncio.run(Routed("A").choose_replicas([SimpleNamespace(replica_id="A")], None))
    assert [[replica.replica_id for replica in rank] for rank in ranks] == [["A"]]
