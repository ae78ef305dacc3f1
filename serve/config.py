"""Settings of the server, shared by the Ray Serve application and the ``serve`` section of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serve.engine import EngineConfig


class ServerConfig(EngineConfig):
    """Engine settings, the resources of a replica, and the limits of its HTTP interface."""

    replicas: Annotated[int, Field(ge=1)] = 1
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    threads_per_replica: Annotated[int, Field(ge=1)] = 1
    """Threads that PyTorch uses in a replica."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 8_000_000
    """The server answers 413 to a larger request body."""
