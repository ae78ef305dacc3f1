"""Collectives over data-parallel ranks. In a single process they return their input."""

from __future__ import annotations

import secrets

import torch
import torch.distributed as dist
from torch import Tensor

from model.distributed.dtensor import is_sharded, to_local


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def broadcast_from_rank_0(value: int, device: torch.device | str = "cpu") -> int:
    """Return rank 0's ``value`` on every rank."""
    number = torch.tensor(int(value), device=device)
    if world_size() > 1:
        dist.broadcast(number, src=0)
    return int(number)


def shared_random_id(device: torch.device | str = "cpu") -> int:
    """Return a random number equal on all ranks, drawn from the system to leave torch's generators untouched."""
    return broadcast_from_rank_0(secrets.randbits(62), device)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum ``x`` over all ranks in place and return it."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def max_over_ranks(value: int, device: torch.device | str = "cpu") -> int:
    """Return the maximum of ``value`` over all ranks."""
    maximum = torch.tensor(value, device=device)
    if world_size() > 1:
        dist.all_reduce(maximum, dist.ReduceOp.MAX)
    return int(maximum)


def gather_over_ranks(x: Tensor) -> Tensor:
    """Stack the ``x`` of all ranks, which must agree in shape, in rank order: [world, ...]."""
    if world_size() == 1:
        return x.unsqueeze(0)
    gathered = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(gathered, x.contiguous())
    return torch.stack(gathered)


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average the gradients of unsharded parameters over ranks in one all-reduce.

    A missing gradient counts as zero, so that ranks always exchange equal shapes. FSDP averages those of sharded
    parameters in the backward pass.
    """
    replicated = [p for p in parameters if not is_sharded(p)]
    if world_size() == 1 or not replicated:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in replicated])
    dist.all_reduce(flat)
    flat /= world_size()
    for p, gradient in zip(replicated, flat.split([p.numel() for p in replicated])):
        p.grad = gradient.view_as(p)


def clip_gradients(parameters: list[torch.nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their total norm is at most ``max_norm``; return the norm before.

    Each rank holds rows of a sharded gradient, whose squared norms are summed over ranks, and all of any other.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([g for g in gradients if not is_sharded(g)])
    if any(map(is_sharded, parameters)):
        sharded_norm = torch.nn.utils.get_total_norm([to_local(g) for g in gradients if is_sharded(g)])
        norm = (norm**2 + sum_over_ranks(sharded_norm**2)).sqrt()
    if gradients:
        torch._foreach_mul_([to_local(g) for g in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
