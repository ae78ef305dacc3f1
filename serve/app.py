"""The Ray Serve application. ``import_path: serve.app:build`` in a Serve config file, or :func:`build` from Python."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve as ray_serve
from ray.serve import Application

from kernels.hardware import multiplies_bf16_fast
from model import checkpoint as checkpoints
from model.errors import ConfigError
from model.execution import Execution, Mode
from model.tokenizer import load_tokenizer
from serve.engine import Engine, Limits
from serve.openai_api import create_app

APPLICATION = "fiftyfold"


class ServeArgs(BaseModel):
    """What :func:`build` takes; plain values, so that a YAML file can give them."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    checkpoint: str
    """A checkpoint folder that every node of the cluster can read."""
    model_name: str = APPLICATION
    """What clients call it."""
    replicas: Annotated[int, Field(ge=1)] = 1
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    threads_per_replica: Annotated[int, Field(ge=1)] = 1
    execution: Mode = "auto"
    """How the network is computed (:class:`model.execution.Execution`)."""
    weights: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the matrices (:meth:`model.transformer.Transformer.store_weights`); auto is bfloat16 where the
    replica's machine multiplies it faster than float32: prompts are read with such products."""
    max_active_requests: Annotated[int, Field(ge=1)] = 16
    max_waiting_requests: Annotated[int, Field(ge=0)] = 64
    prefill_chunk: Annotated[int, Field(ge=1)] = 512
    max_body_bytes: Annotated[int, Field(ge=1024)] = 8_000_000
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 120.0


@ray_serve.deployment(name="completions", health_check_period_s=5, graceful_shutdown_timeout_s=10)
@ray_serve.ingress()
class CompletionsServer:
    """One replica: a model, its engine, and the HTTP routes."""

    def __init__(self, args: dict[str, Any]):
        self.args = ServeArgs.model_validate(args)
        torch.set_num_threads(self.args.threads_per_replica)
        device = "cuda" if self.args.gpus_per_replica > 0 else "cpu"
        model = checkpoints.load(self.args.checkpoint, device=device)
        model.execution = Execution(self.args.execution)
        self.weights = self.args.weights
        if self.weights == "auto":
            self.weights = "bfloat16" if multiplies_bf16_fast(device) else "float32"
        model.store_weights(getattr(torch, self.weights))
        self.engine = Engine(
            model,
            load_tokenizer(self.args.checkpoint),
            Limits(
                max_active=self.args.max_active_requests,
                max_waiting=self.args.max_waiting_requests,
                prefill_chunk=self.args.prefill_chunk,
                timeout_seconds=self.args.request_timeout_seconds,
            ),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.engine, self.args.model_name, self.args.max_body_bytes, self.weights)

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        self.engine.check_health()


def build(args: dict[str, Any]) -> Application:
    """The application for ``args`` (see :class:`ServeArgs`). Raises ConfigError for a setting it does not know."""
    try:
        settings = ServeArgs.model_validate(args)
    except pydantic.ValidationError as error:
        item = error.errors()[0]
        raise ConfigError(f"serve args: {'.'.join(map(str, item['loc']))}: {item['msg']}") from None
    return CompletionsServer.options(  # type: ignore[attr-defined]
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
        # More than the engine takes on, so that the engine's own limit answers 429 and health checks get through.
        max_ongoing_requests=2 * (settings.max_active_requests + settings.max_waiting_requests) + 16,
    ).bind(settings.model_dump())
