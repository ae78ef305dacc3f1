"""Assembly of the ASGI application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from serve.api import cache, chat, completions, errors, metrics, models, page, tokenization
from serve.api.authorization import Authorization, digest, read_key
from serve.api.chat_template import ChatTemplate
from serve.api.config import HttpConfig
from serve.api.json_body import JsonRoute
from serve.api.logprobs import TokenFormatter
from serve.api.middleware import CrossOrigin, Paths, RequestBodies
from serve.api.served_model import ServedModel
from serve.engine import Engine, Pace


def new_app(**options: Any) -> FastAPI:
    """Return an application without routes and without pages of FastAPI's, which load scripts from other sites."""
    return FastAPI(
        title="fiftyfold",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        strict_content_type=False,  # JsonRoute checks it
        telemetry={"tracing": False, "metrics": False, "logs": False},
        **options,
    )


def add_middleware(app: FastAPI, config: HttpConfig, measured: metrics.Metrics | None = None) -> None:
    """Add the middleware of ``config``. Raises ConfigError for an API key that cannot be read."""
    # The last one sees a request first.
    app.add_middleware(RequestBodies, max_bytes=config.max_body_bytes)
    if (key := read_key(config)) is not None:
        app.add_middleware(Authorization, key_digest=digest(key))
    if measured is not None:
        app.add_middleware(metrics.CountRequests, metrics=measured)
    app.add_middleware(CrossOrigin, origins=config.allowed_origins)
    app.add_middleware(Paths)


def create_app(
    engine: Engine, model_name: str, config: HttpConfig | None = None, version: str | None = None
) -> FastAPI:
    """Return an application that serves ``engine`` as ``model_name``, a model's ``version`` of the registry.

    Raises ConfigError for a malformed chat template and for an API key that cannot be read.
    """
    config = config or HttpConfig()
    app = new_app()
    app.router.route_class = JsonRoute
    errors.add_handlers(app)
    reporter = cache.CacheReporter(engine)
    measured = metrics.Metrics(engine, reporter)
    engine.observer = measured.observe
    engine.name_model(model_name)
    add_middleware(app, config, measured)
    served = ServedModel(model_name, engine, TokenFormatter(engine.tokenizer), ChatTemplate(engine.tokenizer), version)
    pace = Pace(config.stream_interval_seconds, config.keep_alive_seconds)
    completions.add_routes(app, served, pace)
    chat.add_routes(app, served, pace)
    models.add_routes(app, served)
    tokenization.add_routes(app, served)
    cache.add_routes(app, reporter)
    metrics.add_routes(app, measured)
    page.add_routes(app)
    return app
