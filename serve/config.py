"""Settings of the server, shared by the Ray Serve application and the ``serve`` section of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serve.api.config import HttpConfig
from serve.engine import EngineConfig


class ServerConfig(EngineConfig, HttpConfig):
    """Settings of the engine and of its HTTP interface, and the resources of a replica."""

    replicas: Annotated[int, Field(ge=1)] = 1
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    threads_per_replica: Annotated[int, Field(ge=1)] = 1
    """Threads that PyTorch uses in a replica."""
