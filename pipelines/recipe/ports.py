"""A check of ports before a server starts."""

from __future__ import annotations

import socket

from model.errors import ConfigError


def require_free_port(key: str, host: str, port: int) -> None:
    """Raise ConfigError, naming ``key``, unless a server can listen on the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # like servers, ignore connections in TIME_WAIT
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"{key}: cannot listen on {host}:{port} ({error.strerror})") from error
