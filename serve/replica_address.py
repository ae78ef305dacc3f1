"""Address of the gRPC server through which Serve's processes call a replica."""

from __future__ import annotations

import ipaddress
from typing import Any

import ray
from ray._common.tls_utils import add_port_to_grpc_server
from ray.serve._private import replica

_HOST = "127.0.0.1"


def listen_on_loopback() -> None:
    """Make the gRPC server of this replica listen on loopback, if the node's address is one.

    Call this in the constructor of a deployment; Ray Serve starts the server afterwards. It has no setting for the
    address and listens on all interfaces.
    """
    if ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        replica.add_port_to_grpc_server = _add_port


def _add_port(server: Any, address: str) -> int:
    return add_port_to_grpc_server(server, address.replace("[::]", _HOST))
