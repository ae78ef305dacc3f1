"""Recipes of deployments on this machine."""

import socket
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
