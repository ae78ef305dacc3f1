"""The page in a headless browser: models, streamed text, errors, and cache bytes."""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path

import pytest
from fastapi.responses import HTMLResponse
from listening_server import Listening, listening_app
from replicas import Replicas

from serve.api.asgi import create_app
from serve.api.config import HttpConfig
from serve.api.page import PAGE
from serve.engine import Engine
from serve.gateway.asgi import create_gateway

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser found: {', '.join(BROWSERS)}")
CONFIG = HttpConfig(keep_alive_seconds=60)


@pytest.fixture(scope="module")
def server(endless_model, letters, byte_model, byte_tokenizer) -> Iterator[Listening]:
    engines = {"letters": Engine(endless_model, letters), "raw/bytes": Engine(byte_model, byte_tokenizer)}
    models = {name: Replicas(create_app(engine, name, CONFIG, "3")) for name, engine in engines.items()}
    app = create_gateway(models, CONFIG, 60)

    @app.get("/pause")
    async def pause() -> None:
        await asyncio.sleep(0.1)

    @app.get("/driven/{script:path}")
    async def driven(script: str) -> HTMLResponse:
        """The page, and a script that does what a user would do."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>"))

    with listening_app(app, engines["letters"]) as server:
        yield server


@pytest.fixture
def browse(server, tmp_path) -> Callable[..., dict[str, str]]:
    def browse(script: str, screenshot: str | None = None) -> dict[str, str]:
        """Return the texts of the page's elements by ID, some seconds after the script ran."""
        shot = Path(os.environ.get("SCREENSHOTS", tmp_path)) / screenshot if screenshot else None
        result = [f"--screenshot={shot}", "--window-size=1000,760"] if shot else ["--dump-dom"]
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
                   "--virtual-time-budget=6000", *result, f"{server.url}/driven/{script}"]  # fmt: skip
        found = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert found.returncode == 0, found.stderr
        if shot:
            assert shot.read_bytes().startswith(b"\x89PNG")
            return {}
        texts = {}
        for id in ("model", "context", "error", "text", "summary", "cache"):
            [(_, content)] = re.findall(rf'<(\w+)[^>]*\bid="{id}"[^>]*>(.*?)</\1>', found.stdout, re.DOTALL)
            texts[id] = unescape(re.sub(r"<[^>]+>", " ", content)).strip()
        return texts

    return browse


SEND = '$("prompt").value="the rain";$("tokens").value=40;$("temperature").value=0;$("send").click();'
# The browser's clock stands still during a request, but not while a stream is read: hence the requests to /pause.
WHEN_READY = (
    "const timer=setInterval(async()=>{if(!models.length)return;clearInterval(timer);%s"
    'do await fetch("/pause");while($("send").disabled)},50)'
)


def test_the_page_shows_models_text_and_cache(server, browse) -> None:
    found = browse(WHEN_READY % SEND)
    assert found["error"] == ""
    assert "letters, version 3" in found["model"] and "raw/bytes, version 3" in found["model"]
    assert found["context"] == "512 tokens, chat template: built-in"
    assert found["text"].startswith("the rain") and len(found["text"]) > len("the rain") + 20
    assert re.match(r"[\d,]+ bytes in use, \d+ pages used", found["summary"])
    assert "total" in found["cache"] and "times smaller" in found["cache"]


def test_another_model_can_be_selected(server, browse) -> None:
    letters = browse(WHEN_READY % SEND)["text"]
    other = browse(WHEN_READY % f'$("model").value="raw/bytes";$("chat").checked=true;{SEND}')
    assert other["error"] == "" and other["text"] != letters
    assert "chat template" in other["context"]


def test_errors_are_shown(server, browse) -> None:
    found = browse(WHEN_READY % SEND.replace("=40", "=4000"))
    assert "no room for a prompt in the model's context of 512 tokens" in found["error"]
    assert found["text"] == "the rain"


def test_a_screenshot_is_a_picture(server, browse) -> None:
    browse(WHEN_READY % SEND, screenshot="page.png")
