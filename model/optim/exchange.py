"""Muon over several ranks: every matrix is orthogonalised whole, by one of them.

Where a matrix's rows are spread over the ranks (FSDP), its owner gathers them and sends each rank the update of its
rows. Where every rank holds all of it (replicas), the owner sends all of them the whole update. A matrix that lies
whole on one rank, as the experts of a sharded stack do, stays there and is not seen here.

Momentum is not sent: it belongs to the rows and changes elementwise, so each rank keeps that of the rows it holds.
With its owner instead, a checkpoint would depend on who owns what, and memory on how costs happen to fall.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_ROUND = 1 << 26
"""Numbers that are on their way together: what bounds the memory of the messages."""


@dataclass(frozen=True)
class Matrix:
    """A matrix that ranks have in common."""

    rows: int
    columns: int
    held: tuple[tuple[int, int], ...]
    """Each rank's rows, from and to. They share the matrix out, or each is all of it."""
    cost: float
    """Of its orthogonalisation, in any unit."""

    @property
    def replicated(self) -> bool:
        return all(span == (0, self.rows) for span in self.held)

    def shape_on(self, rank: int) -> tuple[int, int]:
        """Of the rows that ``rank`` holds."""
        begin, end = self.held[rank]
        return end - begin, self.columns


def assign(costs: Sequence[float], loads: Sequence[float]) -> list[int]:
    """An owner for each cost, the dearest first and always the rank with the least to do. ``loads`` is what the ranks
    have to do already; without any, the busiest ends up at most a third above the best division (Graham 1969)."""
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, owner = heap[0]
        owners[i] = owner
        heapq.heapreplace(heap, (load + costs[i], owner))
    return owners


class Exchange:
    """The matrices that the ranks of the default process group divide among themselves.

    Every rank must make it of the same matrices and ``loads`` (what each rank has to do already), and call it in step.
    """

    def __init__(self, matrices: Sequence[Matrix], loads: Sequence[float], dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.rank, self.ranks = dist.get_rank(), range(dist.get_world_size())
        self.matrices = list(matrices)
        self.owners = assign([matrix.cost for matrix in matrices], loads)

    def orthogonalise(
        self,
        chosen: Sequence[int],
        read: Callable[[int], Tensor],
        compute: Callable[[list[Tensor]], list[Tensor]],
        write: Callable[[int, Tensor], None],
    ) -> None:
        """Take the matrices numbered ``chosen`` through ``compute``, which maps whole matrices [rows, columns] of any
        shapes to their updates.

        ``read(i)`` gives this rank's rows of matrix i (where all hold it, only its owner is asked) and
        ``write(i, update)`` takes the update of this rank's rows. All are of the exchange's type and on its device.
        """
        for some in self._rounds(chosen):
            owned = [[i for i in some if self.owners[i] == rank] for rank in self.ranks]
            mine = owned[self.rank]
            if self.matrices[some[0]].replicated:
                whole = [read(i) for i in mine]
            else:
                sent = [[read(i) for i in of_rank] for of_rank in owned]
                found = self._swap(sent, [[self.matrices[i].shape_on(rank) for i in mine] for rank in self.ranks])
                whole = [torch.cat(rows) for rows in zip(*found)]
            updates = compute(whole)
            sent = [[u[slice(*self.matrices[i].held[rank])] for i, u in zip(mine, updates)] for rank in self.ranks]
            found = self._swap(sent, [[self.matrices[i].shape_on(self.rank) for i in of_rank] for of_rank in owned])
            for of_rank, rows in zip(owned, found):
                for i, update in zip(of_rank, rows):
                    write(i, update)

    def _rounds(self, chosen: Sequence[int]) -> Iterator[list[int]]:
        """Those that all hold, which need not be gathered, apart from the others."""
        for replicated in (True, False):
            some: list[int] = []
            numbers = 0
            for i in chosen:
                matrix = self.matrices[i]
                if matrix.replicated != replicated:
                    continue
                size = matrix.rows * matrix.columns
                if some and numbers + size > _ROUND:
                    yield some
                    some, numbers = [], 0
                some.append(i)
                numbers += size
            if some:
                yield some

    def _swap(self, sent: list[list[Tensor]], shapes: list[list[tuple[int, int]]]) -> list[list[Tensor]]:
        """Send every rank its list of tensors; returns those that each rank sent, of the given shapes."""
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        outgoing = torch.cat([empty, *(t.flatten() for of_rank in sent for t in of_rank)])
        counts = [[rows * columns for rows, columns in of_rank] for of_rank in shapes]
        incoming = outgoing.new_empty(sum(map(sum, counts)))
        dist.all_to_all_single(incoming, outgoing, [*map(sum, counts)], [sum(t.numel() for t in r) for r in sent])
        pieces = iter(incoming.split([count for of_rank in counts for count in of_rank]))
        return [[next(pieces).view(shape) for shape in of_rank] for of_rank in shapes]
