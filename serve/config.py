"""Settings of the server, shared by the Ray Serve applications and the ``serve`` section of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from serve.api.config import HttpConfig
from serve.engine import EngineConfig


class ServerConfig(EngineConfig, HttpConfig):
    """Number and resources of replicas and gateways, and the settings of the base classes."""

    replicas: Annotated[int, Field(ge=1)] = 1
    """Replicas of each model; with ``max_replicas``, the fewest."""
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    """Most replicas of each model. More than ``replicas`` turns autoscaling on; None keeps ``replicas``."""
    target_requests_per_replica: Annotated[float, Field(gt=0)] | None = None
    """Running and waiting requests per replica that autoscaling aims at. None: ``max_active_requests``, so that
    replicas are added while requests wait."""
    upscale_delay_seconds: Annotated[float, Field(ge=0)] = 10.0
    """Time for which more replicas must be needed before they are started."""
    downscale_delay_seconds: Annotated[float, Field(ge=0)] = 300.0
    """Time for which fewer replicas must suffice before some are stopped."""
    gateways: Annotated[int, Field(ge=1)] = 1
    """Gateway processes, which pass requests to the replicas."""
    drain_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that running requests get to finish when the server stops, or their replica is removed or replaced."""
    health_check_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Time between two health checks of a replica. One that fails or does not answer is replaced."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    threads_per_replica: Annotated[int, Field(ge=1)] = 1
    """Threads that PyTorch uses in a replica."""

    @model_validator(mode="after")
    def _check_replicas(self) -> ServerConfig:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas: must be at least replicas ({self.replicas}), found {self.max_replicas}")
        return self

    @property
    def most_replicas(self) -> int:
        return self.replicas if self.max_replicas is None else self.max_replicas

    @property
    def max_ongoing_requests(self) -> int:
        """Requests that Ray Serve lets into a replica: more than the engine holds, so that the engine answers 429
        itself and health checks get through."""
        return 2 * (self.max_active_requests + self.max_waiting_requests) + 16
