"""Functions run on several ranks: processes of this machine that talk by gloo."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world, function, *arguments):
    """``function(rank, world, *arguments)`` on every rank; it must be importable, and must not fail on any."""
    mp.spawn(_rank, (world, _free_port(), function, arguments), nprocs=world)


def _rank(rank, world, port, function, arguments):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    function(rank, world, *arguments)
    dist.destroy_process_group()


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
