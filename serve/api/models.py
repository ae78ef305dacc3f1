"""Routes that describe the served model, its health, and the version of the server."""

from __future__ import annotations

import time

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from model.errors import FiftyfoldError
from serve import __version__
from serve.api.errors import error_body
from serve.api.schemas.models import ModelCard, ModelList
from serve.api.served_model import ServedModel


def add_routes(app: FastAPI, served: ServedModel) -> None:
    engine = served.engine
    card = ModelCard(
        id=served.name,
        version=served.version,
        created=int(time.time()),
        max_model_len=engine.model_config.max_positions,
        cache_bytes_per_token=engine.cache_bytes_per_token(),
        chat_template=served.chat_template.source,
    )

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        served.check_name(name)
        return card

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/health")
    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """Answer 200 if the engine is healthy, else 503."""
        try:
            engine.check_health()
        except FiftyfoldError as error:
            return JSONResponse(error_body(str(error), "server_error"), 503)
        return JSONResponse(
            {
                "status": "ok",
                "model": served.name,
                "weights": engine.config.weights,
                "unfinished": engine.unfinished,
            }
        )
