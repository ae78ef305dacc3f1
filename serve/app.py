"""Ray Serve application: ``import_path: serve.app:build`` in a Serve config file, or :func:`build` from Python."""

from __future__ import annotations

from typing import Any

import pydantic
import torch
from fastapi import FastAPI
from pydantic import ConfigDict
from ray import serve as ray_serve
from ray.serve import Application

from model.errors import ConfigError
from serve.api.asgi import create_app
from serve.config import ServerConfig
from serve.engine import Engine

APPLICATION = "fiftyfold"


class ServeArgs(ServerConfig):
    """Arguments of :func:`build`. All are plain values, so that a YAML file can hold them."""

    model_config = ConfigDict(protected_namespaces=())  # allows the prefix in model_name

    checkpoint: str
    """Checkpoint folder, readable from every node of the cluster."""
    model_name: str = APPLICATION
    """Name that clients use for the model."""


@ray_serve.deployment(name="completions", health_check_period_s=5, graceful_shutdown_timeout_s=10)
@ray_serve.ingress()
class CompletionsServer:
    """One replica: a model, its engine, and the HTTP routes."""

    def __init__(self, args: dict[str, Any]):
        self.args = ServeArgs.model_validate(args)
        torch.set_num_threads(self.args.threads_per_replica)
        device = "cuda" if self.args.gpus_per_replica > 0 else "cpu"
        self.engine = Engine.from_checkpoint(self.args.checkpoint, self.args, device)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.engine, self.args.model_name, self.args)

    async def check_health(self) -> None:
        """Raise if the engine has failed. Ray Serve calls this and replaces a replica that raises."""
        self.engine.check_health()


def build(args: dict[str, Any]) -> Application:
    """Return the application for ``args``, the fields of :class:`ServeArgs`. Raises ConfigError for invalid args."""
    try:
        settings = ServeArgs.model_validate(args)
    except pydantic.ValidationError as error:
        item = error.errors()[0]
        raise ConfigError(f"serve args: {'.'.join(map(str, item['loc']))}: {item['msg']}") from None
    return CompletionsServer.options(  # type: ignore[attr-defined]
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
        # Higher than the engine's capacity, so that the engine answers 429 itself and health checks get through.
        max_ongoing_requests=2 * (settings.max_active_requests + settings.max_waiting_requests) + 16,
    ).bind(settings.model_dump())
