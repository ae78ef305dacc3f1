"""Sums and averages over data-parallel ranks; in a single process they change nothing."""

from __future__ import annotations

import secrets

import torch
import torch.distributed as dist
from torch import Tensor

from model.sharding import is_sharded, local


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def from_first(value: int, device: torch.device | str = "cpu") -> int:
    """Rank 0's ``value``, on every rank."""
    number = torch.tensor(int(value), device=device)
    if world_size() > 1:
        dist.broadcast(number, src=0)
    return int(number)


def agreed_number(device: torch.device | str = "cpu") -> int:
    """A random number that all ranks get, drawn from the system: training's own generators do not move."""
    return from_first(secrets.randbits(62), device)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum ``x`` over all ranks, in place; itself in a single process."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def max_over_ranks(value: int, device: torch.device | str = "cpu") -> int:
    most = torch.tensor(value, device=device)
    if world_size() > 1:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def gather_over_ranks(x: Tensor) -> Tensor:
    """Every rank's ``x``, all of one shape, stacked in order: [world, ...]."""
    if world_size() == 1:
        return x.unsqueeze(0)
    pieces = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(pieces, x.contiguous())
    return torch.stack(pieces)


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average gradients over ranks in one message; a missing one counts as zero, so that ranks never disagree. Those of
    sharded parameters were averaged in the backward pass."""
    whole = [p for p in parameters if not is_sharded(p)]
    if world_size() == 1 or not whole:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in whole])
    dist.all_reduce(flat)
    flat /= world_size()
    for p, piece in zip(whole, flat.split([p.numel() for p in whole])):
        p.grad = piece.view_as(p)


def clip_gradients(parameters: list[torch.nn.Parameter], most: float) -> Tensor:
    """Shrink all gradients so that their norm is at most ``most``; returns the norm before. Of sharded ones each rank
    holds rows, and of the others all hold the same."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([g for g in gradients if not is_sharded(g)])
    if any(map(is_sharded, parameters)):
        shards = torch.nn.utils.get_total_norm([local(g) for g in gradients if is_sharded(g)])
        norm = (norm**2 + sum_over_ranks(shards**2)).sqrt()
    if gradients:
        torch._foreach_mul_([local(g) for g in gradients], (most / (norm + 1e-6)).clamp(max=1.0))
    return norm
