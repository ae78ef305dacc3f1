"""Ray Serve applications: one per model, and a gateway in front of them.

A Serve config file names :func:`build_gateway` and :func:`build_model` as ``import_path``. The models are applications
of their own, so that one of them can be replaced while the others and the gateway stay.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

import pydantic
import torch
from fastapi import FastAPI
from pydantic import ConfigDict, Field
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import Message

from model.errors import ConfigError
from model.validation import sentence
from serve.api.asgi import create_app
from serve.api.errors import UnavailableError
from serve.api.schemas.base import MAX_NAME_CHARS
from serve.config import ServerConfig
from serve.engine import Engine
from serve.gateway.asgi import create_gateway
from serve.gateway.backend import ReplicaLostError, call_app
from serve.gateway.router import PrefixRouter
from serve.replica_address import listen_on_loopback

GATEWAY = "fiftyfold"
"""Name of the gateway's application."""
_FIRST_BYTE_MARGIN_SECONDS = 10.0
"""Time beyond ``request_timeout_seconds`` for which the gateway waits, so that the replica reports the timeout."""

ServedName = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
Args = TypeVar("Args", bound=ServerConfig)


class ModelArgs(ServerConfig):
    """Arguments of :func:`build_model`. All are plain values, so that a YAML file can hold them."""

    model_config = ConfigDict(protected_namespaces=())  # allows the prefix in model_name

    model_name: ServedName
    """Name that clients use for the model."""
    checkpoint: str
    """Checkpoint folder, readable from every node of the cluster."""
    version: str | None = None
    """Version of the model registry, for ``/v1/models``."""


class GatewayArgs(ServerConfig):
    """Arguments of :func:`build_gateway`. The settings are those of the models."""

    models: Annotated[list[ServedName], Field(min_length=1)]
    """Names of the models. The first one answers requests that name none."""


def application_name(model_name: str) -> str:
    """Return the name of a model's application."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", model_name).strip("-")
    return f"model-{slug}-{hashlib.sha256(model_name.encode()).hexdigest()[:6]}"


@ray_serve.deployment(name="model", max_surge_percent=100)
class ModelServer:
    """One replica: a model, its engine, and the HTTP routes behind the gateway."""

    def __init__(self, args: dict[str, Any]):
        listen_on_loopback()
        settings = ModelArgs.model_validate(args)
        torch.set_num_threads(settings.threads_per_replica)
        device = "cuda" if settings.gpus_per_replica > 0 else "cpu"
        self.engine = Engine.from_checkpoint(settings.checkpoint, settings, device)
        self._app = create_app(self.engine, settings.model_name, settings.behind_gateway(), settings.version)

    async def respond(
        self, request: dict[str, Any], body: bytes, prefix: Sequence[bytes] = ()
    ) -> AsyncIterator[list[Message]]:
        """Yield the response, as in :class:`serve.gateway.backend.Backend`. ``prefix`` is for the router."""
        async with aclosing(call_app(self._app, request, body)) as batches:
            async for batch in batches:
                yield batch

    async def check_health(self) -> None:
        """Raise if the engine has failed. Ray Serve calls this and replaces a replica that raises."""
        self.engine.check_health()


class ServeBackend:
    """The replicas of a model's application."""

    def __init__(self, model_name: str):
        self._model_name = model_name
        self._handle: DeploymentHandle[Any] | None = None

    async def respond(
        self, request: dict[str, Any], body: bytes, prefix: Sequence[bytes] = ()
    ) -> AsyncIterator[list[Message]]:
        handle = self._handle or await self._find()
        response = handle.respond.remote(request, body, prefix=prefix)
        assert isinstance(response, DeploymentResponseGenerator)  # because the handle has stream=True
        try:
            async for batch in response:
                yield batch
        except (RayActorError, ReplicaUnavailableError) as error:
            raise ReplicaLostError(f"model '{self._model_name}': {type(error).__name__}") from error
        except DeploymentUnavailableError as error:
            raise UnavailableError(f"model '{self._model_name}': its replicas do not start") from error
        finally:
            response.cancel()  # does nothing after the end

    async def _find(self) -> DeploymentHandle[Any]:
        """Return a handle. The applications of a Serve config file start in any order."""
        try:
            handle = await asyncio.to_thread(ray_serve.get_app_handle, application_name(self._model_name))
        except RayServeException:
            raise UnavailableError(f"model '{self._model_name}' has not been deployed yet") from None
        self._handle = handle.options(stream=True)
        return self._handle


@ray_serve.deployment(name="gateway", max_surge_percent=100)
@ray_serve.ingress()
class Gateway:
    """One gateway process."""

    def __init__(self, args: dict[str, Any]):
        listen_on_loopback()
        self._args = GatewayArgs.model_validate(args)
        self._app: FastAPI | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        args = self._args
        models = {name: ServeBackend(name) for name in args.models}
        # A JSON response begins when it is complete, so that its first byte can take the whole time limit.
        self._app = create_gateway(models, args, args.request_timeout_seconds + _FIRST_BYTE_MARGIN_SECONDS)
        return self._app

    async def drain(self) -> None:
        """Refuse further requests, and return when the running ones have ended."""
        if self._app is not None:
            await self._app.state.drain()


def build_gateway(args: dict[str, Any]) -> Application:
    """Return the gateway's application for the fields of :class:`GatewayArgs`. Raises ConfigError for invalid args."""
    settings = _validate(GatewayArgs, args)
    return Gateway.options(  # type: ignore[attr-defined]
        num_replicas=settings.gateways,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=settings.health_check_seconds,
        max_ongoing_requests=settings.max_ongoing_requests * settings.most_replicas * len(settings.models),
    ).bind(settings.model_dump())


def build_model(args: dict[str, Any]) -> Application:
    """Return a model's application for the fields of :class:`ModelArgs`. Raises ConfigError for invalid args."""
    settings = _validate(ModelArgs, args)
    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.most_replicas > settings.replicas:
        scaling = {"autoscaling_config": _autoscaling(settings)}
    return ModelServer.options(  # type: ignore[attr-defined]
        **scaling,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=settings.health_check_seconds,
        max_ongoing_requests=settings.max_ongoing_requests,
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,  # type: ignore[arg-type]  # annotated wrongly by Ray
            request_router_kwargs={"imbalance": max(4, settings.max_active_requests // 4)},
        ),
    ).bind(settings.model_dump())


def _autoscaling(settings: ModelArgs) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=settings.replicas,
        max_replicas=settings.most_replicas,
        target_ongoing_requests=settings.target_requests_per_replica or settings.max_active_requests,
        upscale_delay_s=settings.upscale_delay_seconds,
        downscale_delay_s=settings.downscale_delay_seconds,
    )


def _validate(schema: type[Args], args: dict[str, Any]) -> Args:
    try:
        return schema.model_validate(args)
    except pydantic.ValidationError as error:
        item = error.errors()[0]
        path = ".".join(map(str, item["loc"]))
        problem = sentence(item)
        raise ConfigError(f"serve args: {path + ': ' if path else ''}{problem}") from None
