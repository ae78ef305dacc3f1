"""An endpoint in a process of its own, without Ray: ``python -m benchmarks.lib.server CHECKPOINT [--settings JSON]``.

Prints a line of JSON with its port when it listens. When its standard input closes, it stops, drops all kept prefixes
and prints another line with the cache pages that are still in use.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn

from serve.api.asgi import create_app
from serve.api.config import HttpConfig
from serve.engine import Engine, EngineConfig

MODEL_NAME = "model"


@dataclass
class Server:
    """A server process."""

    url: str
    pid: int
    at_end: dict[str, Any] = field(default_factory=dict)
    """Filled when the server has stopped: ``used_pages``."""


@contextmanager
def running_server(checkpoint: Path, **settings: Any) -> Iterator[Server]:
    """Serve a checkpoint during the block, with fields of EngineConfig and HttpConfig."""
    command = [sys.executable, "-m", "benchmarks.lib.server", str(checkpoint), "--settings", json.dumps(settings)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            port = json.loads(process.stdout.readline())["port"]
            server = Server(f"http://127.0.0.1:{port}", process.pid)
            yield server
            process.stdin.close()
            server.at_end.update(json.loads(process.stdout.readline()))
        finally:
            process.stdin.close()
            process.wait(60)


async def serve(checkpoint: Path, settings: dict[str, Any]) -> None:
    of_engine = {name: value for name, value in settings.items() if name in EngineConfig.model_fields}
    of_http = {name: value for name, value in settings.items() if name not in of_engine}
    engine = Engine.from_checkpoint(checkpoint, EngineConfig(**of_engine))
    app = create_app(engine, MODEL_NAME, HttpConfig(**of_http))
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(json.dumps({"port": server.servers[0].sockets[0].getsockname()[1]}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await running
    while engine.unfinished:
        await asyncio.sleep(0.01)
    prefixes = engine.memory.prefixes
    while len(prefixes):
        prefixes.evict()
    print(json.dumps({"used_pages": engine.memory.used_pages}), flush=True)
    await engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--settings", type=json.loads, default={})
    options = parser.parse_args()
    torch.set_num_threads(1)
    asyncio.run(serve(options.checkpoint, options.settings))


if __name__ == "__main__":
    main()
