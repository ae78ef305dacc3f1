"""Assembly of the gateway's ASGI application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from model.errors import FiftyfoldError
from serve.api import errors, page
from serve.api.asgi import add_middleware, new_app
from serve.api.config import HttpConfig
from serve.api.errors import UnavailableError
from serve.gateway.backend import Backend, ReplicaLostError, fetch
from serve.gateway.forward import STOPPING, Forwarder

_HEALTH_SECONDS = 5.0
_ANSWER_SECONDS = 30.0


def create_gateway(models: Mapping[str, Backend], config: HttpConfig, timeout_seconds: float) -> FastAPI:
    """Return an application that serves ``models`` by name; the first one answers requests that name none.

    It checks API keys, origins and sizes. It answers the page, health checks and the list of models itself, and
    forwards all other requests to a replica. ``app.state.drain`` is :meth:`Forwarder.drain`. Raises ConfigError for an
    API key that cannot be read.

    Args:
        timeout_seconds: Longest wait for the first byte of a replica.
    """
    app = new_app(openapi_url=None)
    forwarder = Forwarder(models, timeout_seconds)
    errors.add_handlers(app)
    add_middleware(app, config)
    page.add_routes(app)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the models with a replica that answers. Raises UnavailableError without any."""
        asked = (_json(name, backend, "/v1/models") for name, backend in models.items())
        answers = await asyncio.gather(*asked, return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        unexpected = [failure for failure in failures if not isinstance(failure, FiftyfoldError)]
        if unexpected or len(failures) == len(answers):
            raise (unexpected or failures)[0]
        listings = [answer["data"] for answer in answers if not isinstance(answer, BaseException)]
        return {"object": "list", "data": [card for cards in listings for card in cards]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return (await _json(name, forwarder.find(name), "/v1/models"))["data"][0]

    @app.get("/health")
    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Report on a healthy replica of every model. Raises UnavailableError if a model has none."""
        if forwarder.draining:
            raise UnavailableError(STOPPING)
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                found = await asyncio.gather(*(_json(name, backend, "/healthz") for name, backend in models.items()))
        except TimeoutError:
            problem = f"a model has no replica that answers within {_HEALTH_SECONDS:g} seconds"
            raise UnavailableError(problem) from None
        return {"status": "ok", "unfinished": sum(report["unfinished"] for report in found), "models": found}

    app.router.default = forwarder
    app.state.drain = forwarder.drain
    return app


async def _json(name: str, backend: Backend, path: str) -> dict[str, Any]:
    """Return the JSON answer of a model's replica. Raises UnavailableError for any other status than 200."""
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            status, body = await fetch(backend, path)
    except TimeoutError:
        raise UnavailableError(f"model '{name}': no replica answers") from None
    except ReplicaLostError:
        raise UnavailableError(f"model '{name}': the replica ended") from None
    answer = json.loads(body)
    if status != 200:
        raise UnavailableError(f"model '{name}': {answer['error']['message']}")
    return answer
