"""Recurrent state of a layer: fixed size per sequence, kept at the ends of the newest calls."""

from __future__ import annotations

import torch
from torch import Tensor

from model.cache.pages import PageTable, zeros
from model.cache.parts import RecurrentPart

_EMPTY = -1


class RecurrentState:
    """States [*shape] of every sequence at the ends of the newest ``rewind`` + 1 calls, [B, kept, *shape].

    A sequence can only resume where a state was kept. The initial state is zero.
    """

    def __init__(self, table: PageTable, part: RecurrentPart, rewind: int):
        self.table, self.part = table, part
        shape = (len(table.lengths), rewind + 1)
        self.data = zeros((*shape, *part.shape), part.dtype, table.pool.device)
        self.positions = zeros(shape, torch.int64, torch.device("cpu")).fill_(_EMPTY)

    def can_resume_at(self, sequence: int, length: int, high_water_mark: int) -> bool:
        return bool((self.positions[sequence] == length).any())

    def truncate(self, sequence: int, length: int) -> None:
        """Remove states of more than ``length`` tokens."""
        if length:
            self.positions[sequence][self.positions[sequence] > length] = _EMPTY
        else:
            self.positions[sequence] = _EMPTY
            self.data[sequence].zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Return the storage by name, [B, ...] each."""
        return {"": self.data, ".positions": self.positions}

    def read(self) -> Tensor:
        """Return the states before the new tokens: [B, *shape]. Raises IndexError if none was kept."""
        rows = []
        for sequence, length in enumerate(self.table.lengths):
            if length:
                rows.append(self.data[sequence, (self.positions[sequence] == length).nonzero()[0, 0]])
            else:
                rows.append(torch.zeros_like(self.data[sequence, 0]))
        return torch.stack(rows)

    def append(self, states: Tensor) -> None:
        """Keep the states after the new tokens, [B, *shape], replacing the oldest states. Detaches them."""
        lengths = zip(self.table.lengths, self.table.new_lengths)
        for sequence, (state, (before, length)) in enumerate(zip(states.detach(), lengths)):
            positions = self.positions[sequence]
            positions[positions > before] = _EMPTY  # states of an interrupted step, whose tokens may be others
            oldest = int(positions.argmin())
            self.data[sequence, oldest] = state
            positions[oldest] = length

    def saved(self) -> dict[str, Tensor]:
        """Return a single sequence's states and positions by name."""
        return {name: tensor[0] for name, tensor in self.tensors().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors of :meth:`saved`."""
        for name, tensor in self.tensors().items():
            tensor[0] = tensors[name]
