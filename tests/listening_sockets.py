"""Sockets on which processes listen."""

import ipaddress
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

import psutil


class Listener(NamedTuple):
    process: str
    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        address = ipaddress.ip_address(self.host)
        mapped = getattr(address, "ipv4_mapped", None)  # such as ::ffff:127.0.0.1
        return (mapped or address).is_loopback


def process_tree() -> list[psutil.Process]:
    """Return this process and all that descend from it."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def listeners(processes: Iterable[psutil.Process]) -> list[Listener]:
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # workers come and go
            sockets = process.net_connections("inet")
            name = " ".join(process.cmdline()).strip()
            found += [Listener(name, *c.laddr) for c in sockets if c.status == psutil.CONN_LISTEN]
    return found
