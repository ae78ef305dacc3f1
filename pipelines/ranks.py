"""Sums and averages over data-parallel ranks; in a single process they change nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum ``x`` over all ranks, in place; itself in a single process."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def gather_over_ranks(x: Tensor) -> Tensor:
    """Every rank's ``x``, all of one shape, stacked in order: [world, ...]."""
    if world_size() == 1:
        return x.unsqueeze(0)
    pieces = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(pieces, x.contiguous())
    return torch.stack(pieces)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average gradients over ranks in one message; a missing one counts as zero, so that ranks never disagree."""
    if world_size() == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= world_size()
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = piece.view_as(p)
