"""A tracking server is reached as MLflow's own client would reach it."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from model.errors import ConfigError
from pipelines.tracking.server import check_server

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@contextmanager
def answering(status: int = 200) -> Iterator[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """Serve ``status`` to every GET; yield the address and the requests as (target, headers)."""
    requests: list[tuple[str, dict[str, str]]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, dict(self.headers)))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def test_a_path_prefix_and_credentials_reach_the_server(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    with answering() as (address, requests):
        check_server(f"http://{address}/mlflow/", "shown")
    (target, headers), = requests  # fmt: skip
    assert target == "/mlflow/health"
    assert headers["Authorization"].startswith("Basic ")


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_a_server_behind_a_proxy_answers(name, monkeypatch):
    with answering() as (address, requests):
        monkeypatch.setenv(name, f"http://{address}")
        check_server("http://mlflow.invalid:5000", "shown")  # a name that only the proxy knows
    assert [target for target, _ in requests] == ["http://mlflow.invalid:5000/health"]


def test_no_proxy_bypasses_the_proxy(monkeypatch):
    with answering() as (proxy, through), answering() as (address, direct):
        monkeypatch.setenv("http_proxy", f"http://{proxy}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        check_server(f"http://{address}", "shown")
    assert (len(through), len(direct)) == (0, 1)


@pytest.mark.parametrize("status", [200, 302, 404, 405, 500])
def test_any_status_of_a_server_is_an_answer(status):
    with answering(status) as (address, _):
        check_server(f"http://{address}", "shown")


REFUSED = {401: "refuses access", 403: "refuses access", 407: "refuses access"}
ABSENT = dict.fromkeys((502, 503, 504), "nothing answers")


@pytest.mark.parametrize(("status", "message"), [*REFUSED.items(), *ABSENT.items()])
def test_refusals_and_gateways_without_a_server_are_named(status, message):
    with answering(status) as (address, _), pytest.raises(ConfigError, match=f"{message}.*status {status}"):
        check_server(f"http://{address}", "shown")


def test_unreachable_servers_are_named_quickly_and_without_a_password(monkeypatch):
    with socket.socket() as silent, socket.socket() as free:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
        monkeypatch.setattr("pipelines.tracking.server.ANSWER_SECONDS", 0.5)
        cases = {
            f"http://u:secret@127.0.0.1:{closed}": "Connection refused",
            f"http://u:secret@127.0.0.1:{silent.getsockname()[1]}": "does not answer in time",
            "http://u:secret@mlflow.invalid": "",
            "https://u:secret@127.0.0.1:1": "Connection refused",
        }
        started = time.monotonic()
        for uri, reason in cases.items():
            with pytest.raises(ConfigError, match=r"tracking\.uri: nothing answers at shown \(") as caught:
                check_server(uri, "shown")
            assert reason in str(caught.value) and "secret" not in str(caught.value)
        with answering() as (plain, _), pytest.raises(ConfigError, match="the TLS connection failed"):
            check_server(f"https://{plain}", "shown")
        monkeypatch.setenv("http_proxy", f"http://u:secret@127.0.0.1:{closed}")
        with pytest.raises(ConfigError, match="nothing answers at shown") as caught:
            check_server("http://mlflow.invalid", "shown")
        assert "secret" not in str(caught.value)
    assert time.monotonic() - started < 60  # MLflow's own client would retry for minutes
