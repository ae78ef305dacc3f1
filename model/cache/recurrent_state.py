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
        lengths = torch.tensor(self.table.lengths).unsqueeze(-1)
        kept, empty = self.positions == lengths, lengths[:, 0] == 0
        if not bool((kept.any(1) | empty).all()):
            raise IndexError(f"no state was kept at the lengths {self.table.lengths}")
        states = self.data.flatten(0, 1).index_select(0, self._rows(kept.int().argmax(1)))
        if bool(empty.any()):  # an interrupted step may have left other values
            states = states.masked_fill(empty.to(states.device).view(-1, *[1] * len(self.part.shape)), 0)
        return states

    def append(self, states: Tensor) -> None:
        """Keep the states after the new tokens, [B, *shape], replacing the oldest states. Detaches them."""
        before, after = (torch.tensor(lengths) for lengths in (self.table.lengths, self.table.new_lengths))
        # States of an interrupted step, whose tokens may be others, are dropped.
        self.positions.masked_fill_(self.positions > before.unsqueeze(-1), _EMPTY)
        oldest = self.positions.argmin(1)
        self.data.flatten(0, 1).index_copy_(0, self._rows(oldest), states.detach().to(self.data.dtype))
        self.positions.scatter_(1, oldest.unsqueeze(-1), after.unsqueeze(-1))

    def _rows(self, places: Tensor) -> Tensor:
        """Return the indices of each sequence's place, int64 [B] each, in the states of all sequences."""
        return (places + torch.arange(len(places)) * self.data.shape[1]).to(self.data.device)

    def saved(self) -> dict[str, Tensor]:
        """Return a single sequence's states and positions by name."""
        return {name: tensor[0] for name, tensor in self.tensors().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors of :meth:`saved`."""
        for name, tensor in self.tensors().items():
            tensor[0] = tensors[name]
