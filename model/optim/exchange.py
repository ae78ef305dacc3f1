"""Distributed Muon: each matrix is orthogonalized by one rank, its owner.

If a matrix is sharded by rows (FSDP), the owner gathers the rows and sends each rank the update of its rows. If it is
replicated, the owner sends the full update to all ranks. A matrix that only one rank holds, such as an expert of a
sharded stack, needs no exchange.

Momentum is elementwise, so each rank keeps the momentum of its own rows. Momentum on the owner would make checkpoints
depend on the assignment of owners, and memory on the distribution of costs.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model.batching import split_by_size

_MAX_ROUND_ELEMENTS = 1 << 26
"""Elements exchanged per round, which bounds the memory of the messages."""


@dataclass(frozen=True)
class Matrix:
    """A matrix that several ranks hold, in full or in part."""

    rows: int
    columns: int
    held: tuple[tuple[int, int], ...]
    """Begin and end of each rank's rows: a partition of the rows, or all rows on every rank."""
    cost: float
    """Cost of orthogonalizing it, in any unit."""

    @property
    def replicated(self) -> bool:
        return all(span == (0, self.rows) for span in self.held)

    def shape_on(self, rank: int) -> tuple[int, int]:
        """Return the shape of the rows that ``rank`` holds."""
        begin, end = self.held[rank]
        return end - begin, self.columns


def assign(costs: Sequence[float], loads: Sequence[float]) -> list[int]:
    """Return an owner for each cost: in order of decreasing cost, the rank with the lowest load.

    ``loads`` are the ranks' initial loads. If they are zero, the highest load is at most 4/3 of the optimum (Graham
    1969)."""
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, owner = heap[0]
        owners[i] = owner
        heapq.heapreplace(heap, (load + costs[i], owner))
    return owners


class Exchange:
    """Distributes the orthogonalization of matrices over the ranks of the default process group.

    Every rank must create it with equal ``matrices`` and ``loads`` (each rank's load from other matrices), and call it
    in the same order.
    """

    def __init__(self, matrices: Sequence[Matrix], loads: Sequence[float], dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.rank, self.ranks = dist.get_rank(), range(dist.get_world_size())
        self.matrices = list(matrices)
        self.owners = assign([matrix.cost for matrix in matrices], loads)

    def orthogonalize(
        self,
        chosen: Sequence[int],
        read: Callable[[int], Tensor],
        compute: Callable[[list[Tensor]], list[Tensor]],
        write: Callable[[int, Tensor], None],
    ) -> None:
        """Apply ``compute``, which maps full matrices [rows, columns] of any shapes to their updates, to the matrices
        with indices ``chosen``.

        ``read(i)`` returns this rank's rows of matrix i; for a replicated matrix only the owner calls it.
        ``write(i, update)`` receives the update of this rank's rows. All tensors have the exchange's dtype and device.
        """
        for some in self._rounds(chosen):
            owned = [[i for i in some if self.owners[i] == rank] for rank in self.ranks]
            mine = owned[self.rank]
            if self.matrices[some[0]].replicated:
                whole = [read(i) for i in mine]
            else:
                sent = [[read(i) for i in of_rank] for of_rank in owned]
                found = self._all_to_all(sent, [[self.matrices[i].shape_on(rank) for i in mine] for rank in self.ranks])
                whole = [torch.cat(rows) for rows in zip(*found)]
            updates = compute(whole)
            sent = [[u[slice(*self.matrices[i].held[rank])] for i, u in zip(mine, updates)] for rank in self.ranks]
            found = self._all_to_all(
                sent, [[self.matrices[i].shape_on(self.rank) for i in of_rank] for of_rank in owned]
            )
            for of_rank, rows in zip(owned, found):
                for i, update in zip(of_rank, rows):
                    write(i, update)

    def _rounds(self, chosen: Sequence[int]) -> Iterator[list[int]]:
        """Yield the indices of each round. Replicated matrices, which need no gathering, have rounds of their own."""
        for replicated in (True, False):
            some = [i for i in chosen if self.matrices[i].replicated == replicated]
            sizes = [self.matrices[i].rows * self.matrices[i].columns for i in some]
            for batch in split_by_size(sizes, _MAX_ROUND_ELEMENTS):
                yield some[batch]

    def _all_to_all(self, sent: list[list[Tensor]], shapes: list[list[tuple[int, int]]]) -> list[list[Tensor]]:
        """Send every rank its list of tensors. Return the tensors of the given ``shapes`` received from each rank."""
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        outgoing = torch.cat([empty, *(t.flatten() for of_rank in sent for t in of_rank)])
        counts = [[rows * columns for rows, columns in of_rank] for of_rank in shapes]
        incoming = outgoing.new_empty(sum(map(sum, counts)))
        dist.all_to_all_single(incoming, outgoing, [*map(sum, counts)], [sum(t.numel() for t in r) for r in sent])
        pieces = iter(incoming.split([count for of_rank in counts for count in of_rank]))
        return [[next(pieces).view(shape) for shape in of_rank] for of_rank in shapes]
