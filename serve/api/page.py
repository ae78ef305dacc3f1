"""Page for a browser: the models, a prompt with streamed text, and live cache bytes."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

PAGE = Path(__file__).with_suffix(".html")
# The page may run its own script and call this server, and nothing else.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


def add_routes(app: FastAPI) -> None:
    content = PAGE.read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(content, headers={"Content-Security-Policy": _POLICY})
