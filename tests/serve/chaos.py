"""Processes of a deployment, and clients that keep it busy while some of them are killed."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import psutil

GATEWAY, REPLICA, PROXY, CONTROLLER = (
    "ray::ServeReplica:fiftyfold:",
    ":model",
    "ray::ProxyActor",
    "ray::ServeController",
)
PATIENCE_SECONDS = 240
"""Only bounds a hang: the machine may be busy."""


def processes(part: str) -> list[int]:
    """Return the process IDs of Ray workers of this test process whose titles contain ``part``."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::") and part in title:
            found.append(process.pid)
    return found


def kill(part: str, count: int | None = None) -> None:
    """SIGKILL such processes, all of them by default."""
    pids = processes(part)[:count]
    assert pids, part
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def answers(url: str, **fields: object) -> bool:
    """Return whether the endpoint completes a prompt."""
    body = {"prompt": "the", "max_tokens": 2, **fields}
    try:
        return httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_SECONDS).status_code == 200
    except httpx.HTTPError:
        return False


@dataclass
class Outcomes:
    """Counts of the ways in which requests ended. Errors are statuses with bodies, or exceptions of the client."""

    complete: list[dict] = field(default_factory=list)
    """JSON responses, and the last events of streams that were complete."""
    stream_errors: list[dict] = field(default_factory=list)
    """Errors in streams that ended with ``[DONE]``."""
    errors: list[str] = field(default_factory=list)


@contextmanager
def busy(url: str, clients: int = 4, max_tokens: int = 60, **fields: object) -> Iterator[Outcomes]:
    """Send requests from several threads during the block, half of them streamed, and wait for their ends."""
    outcomes, stop = Outcomes(), threading.Event()

    def client(number: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            body = {"prompt": f"the rain {chr(97 + number)} " * 3, "max_tokens": max_tokens, "seed": count, **fields}
            try:
                if number % 2:
                    _stream(url, body, outcomes)
                else:
                    response = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_SECONDS)
                    if response.status_code == 200:
                        outcomes.complete.append(response.json())
                    else:
                        outcomes.errors.append(f"{response.status_code} {response.text}")
            except httpx.HTTPError as error:
                outcomes.errors.append(repr(error))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(outcomes.complete) >= clients)
        yield outcomes
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _stream(url: str, body: dict, outcomes: Outcomes) -> None:
    text, events, error = "", [], None
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=PATIENCE_SECONDS
    ) as response:
        if response.status_code != 200:
            outcomes.errors.append(f"{response.status_code} {response.read().decode()}")
            return
        for line in response.iter_lines():
            events += [line] if line.startswith("data: ") else []
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                error = event.get("error", error)
                text += "".join(choice["text"] for choice in event.get("choices", []))
    if not events or events[-1] != "data: [DONE]":
        outcomes.errors.append(f"a stream without end after {text!r}")
    elif error is not None:
        outcomes.stream_errors.append(error)
    else:
        outcomes.complete.append({"model": body.get("model"), "choices": [{"text": text}]})
