"""Recipes of deployments on this machine, and deployments in processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from pipelines.recipe.loading import recipe_from_dict
from pipelines.recipe.schema import Recipe


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def recipe_for(folder: Path, model_uri: str | Path, **serve) -> Recipe:
    # Keep the weights in float32 on every processor: completions are compared with the network's.
    serve = {"model_uri": str(model_uri), "port": free_port(), "cpus_per_replica": 0.5, "weights": "float32", **serve}
    return recipe_from_dict({"run": {"folder": str(folder)}, "serve": serve})


def deploy(recipe: Recipe, address: str | None) -> subprocess.Popen:
    """Run the deploy step in a process of its own and wait until it serves."""
    command = [sys.executable, "-m", "pipelines", "deploy", "--run.folder", str(recipe.run.folder)]
    for key, value in recipe.serve.model_dump(exclude_defaults=True).items():
        command += [f"--serve.{key}", str(value)]
    environment = {**os.environ, **({"RAY_ADDRESS": address} if address else {})}
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    while not (lines and lines[-1].strip().startswith("curl ")):
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
    return process


def url_of(recipe: Recipe) -> str:
    return f"http://127.0.0.1:{recipe.serve.port}"
