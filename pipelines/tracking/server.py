"""A check that a tracking server answers, before MLflow's client retries in silence for a minute."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from model.errors import ConfigError

CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 10.0


def check_server(uri: str, shown: str) -> None:
    """Raise ConfigError unless an HTTP server answers at ``uri``.

    The request is one of MLflow's own client, with its proxies (``http_proxy``, ``NO_PROXY``), certificates and
    credentials. A status that only says that the server has no ``/health`` counts as an answer.

    Args:
        shown: The URI without a password, for messages.
    """
    try:
        response = http_request(
            get_default_host_creds(uri),
            "/health",
            "GET",
            max_retries=0,
            timeout=(CONNECT_SECONDS, ANSWER_SECONDS),
            raise_on_status=False,
        )
    except MlflowException as error:
        raise ConfigError(f"tracking.uri: nothing answers at {shown} ({_reason(error)})") from error
    status = f"status {response.status_code}"
    if response.status_code in (401, 403, 407):
        raise ConfigError(
            f"tracking.uri: {shown} refuses access ({status}); set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if response.status_code in (502, 503, 504):  # of a proxy
        raise ConfigError(f"tracking.uri: nothing answers at {shown} ({status})")


_REASONS = {
    "Timeout": "it does not answer in time",
    "SSL": "the TLS connection failed",
    "InvalidURL": "the URI is not valid",
    "InvalidSchema": "the proxy's scheme is not supported",
    "Proxy": "the connection failed",
}
"""Texts by part of the name of an error of requests or urllib3, the most specific first."""


def _reason(error: BaseException) -> str:
    """Return the cause of a failed request in a few words. The error itself holds the URI with its password."""
    causes = list(_causes(error))
    names = " ".join(type(cause).__name__ for cause in causes)
    # TLS errors are operating system errors to Python, with codes of OpenSSL for a text.
    plain = (cause for cause in causes if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError))
    system = [cause.strerror for cause in plain if cause.strerror]
    reason = system[-1] if system else next((text for name, text in _REASONS.items() if name in names), "no connection")
    return f"proxy: {reason}" if "Proxy" in names else reason


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors within it, of requests and urllib3, the innermost last."""
    seen: list[BaseException] = []
    pending = [error]
    while pending:
        current = pending.pop(0)
        if not isinstance(current, BaseException) or current in seen:
            continue
        seen.append(current)
        yield current
        pending += [current.__cause__, current.__context__, getattr(current, "reason", None), *current.args]
