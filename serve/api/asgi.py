"""Assembly of the ASGI application."""

from __future__ import annotations

from fastapi import FastAPI

from serve.api import completions, errors, models, tokenization
from serve.api.logprobs import TokenFormatter
from serve.api.served_model import ServedModel
from serve.engine import Engine


def create_app(engine: Engine, model_name: str, max_body_bytes: int) -> FastAPI:
    """Return an application that serves ``engine`` as ``model_name`` and refuses bodies over ``max_body_bytes``."""
    app = FastAPI(
        title="fiftyfold",
        docs_url=None,  # these pages would load scripts from external sites
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    errors.add_handlers(app)
    app.add_middleware(errors.BodySizeLimit, max_bytes=max_body_bytes)
    served = ServedModel(model_name, engine, TokenFormatter(engine.tokenizer))
    for routes in (completions, models, tokenization):
        routes.add_routes(app, served)
    return app
