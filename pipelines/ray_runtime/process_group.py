"""The process group of a training's ranks. On a local cluster it communicates over loopback only."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from datetime import timedelta
from typing import Any

import ray
import ray.train
import torch.distributed as dist
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig

_HOST = "127.0.0.1"
_TORCH_BACKEND = TorchConfig().backend_cls
_stores: list[dist.TCPStore] = []
"""Servers of this process. They must outlive the process group."""


def torch_config() -> TorchConfig:
    """Return a configuration for :class:`ray.train.torch.TorchTrainer` on the current cluster."""
    is_local = ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback
    return _LoopbackConfig() if is_local else TorchConfig()


class _LoopbackConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _LoopbackBackend


class _LoopbackBackend(Backend):
    """Counterpart of Ray Train's torch backend whose store listens on loopback.

    The store that torch starts for ``env://`` and ``tcp://`` listens on all interfaces, without authentication. Whoever
    writes to it can connect the ranks to other machines. The variables of that rendezvous, such as MASTER_ADDR, are not
    set.
    """

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, TorchConfig)
        device = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo"
        port = worker_group.execute_single(0, _serve_store)
        arguments = (port, backend_config.backend or device, backend_config.timeout_s)
        worker_group.execute(_join, *arguments)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        _TORCH_BACKEND().on_shutdown(worker_group, backend_config)


def _serve_store() -> int:
    """Start a store in this process and return its port."""
    listener = socket.create_server((_HOST, 0))
    port = listener.getsockname()[1]
    _stores.append(
        dist.TCPStore(_HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    )
    return port


def _join(port: int, backend: str, seconds: float) -> None:
    """Initialize the process group of this rank."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    if sys.platform == "linux":  # elsewhere the interface has another name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ |= {"LOCAL_RANK": str(context.get_local_rank()), "LOCAL_WORLD_SIZE": str(context.get_local_world_size())}
    timeout = timedelta(seconds=seconds)
    store = dist.TCPStore(_HOST, port, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
