"""Assembly of the ASGI application."""

from __future__ import annotations

from fastapi import FastAPI

from serve.api import cache, chat, completions, errors, metrics, models, page, tokenization
from serve.api.authorization import Authorization, digest, read_key
from serve.api.chat_template import ChatTemplate
from serve.api.config import HttpConfig
from serve.api.json_body import JsonRoute
from serve.api.logprobs import TokenFormatter
from serve.api.middleware import CrossOrigin, Paths, RequestBodies
from serve.api.served_model import ServedModel
from serve.engine import Engine


def create_app(engine: Engine, model_name: str, config: HttpConfig | None = None) -> FastAPI:
    """Return an application that serves ``engine`` as ``model_name``.

    Raises ConfigError for a malformed chat template and for an API key that cannot be read.
    """
    config = config or HttpConfig()
    app = FastAPI(
        title="fiftyfold",
        docs_url=None,  # these pages would load scripts from external sites
        redoc_url=None,
        redirect_slashes=False,
        strict_content_type=False,  # JsonRoute checks it
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.router.route_class = JsonRoute
    errors.add_handlers(app)
    reporter = cache.CacheReporter(engine)
    measured = metrics.Metrics(engine, reporter)
    engine.observer = measured.observe
    # The last one sees a request first.
    app.add_middleware(RequestBodies, max_bytes=config.max_body_bytes)
    if (key := read_key(config)) is not None:
        app.add_middleware(Authorization, key_digest=digest(key))
    app.add_middleware(metrics.CountRequests, metrics=measured)
    app.add_middleware(CrossOrigin, origins=config.allowed_origins)
    app.add_middleware(Paths)
    served = ServedModel(model_name, engine, TokenFormatter(engine.tokenizer), ChatTemplate(engine.tokenizer))
    completions.add_routes(app, served, config.keep_alive_seconds)
    chat.add_routes(app, served, config.keep_alive_seconds)
    models.add_routes(app, served)
    tokenization.add_routes(app, served)
    cache.add_routes(app, reporter)
    metrics.add_routes(app, measured)
    page.add_routes(app)
    return app
