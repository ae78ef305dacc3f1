"""Rows of a sequence that each query has chosen, for operations that compute by blocks of queries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_VALUES = 1 << 18
"""Maximum number of values gathered per block of several queries on a CPU: 1 MiB fits into a second-level cache."""
_MAX_VALUES_ON_GPU = 1 << 26
"""Limit on a GPU, where small blocks would leave it idle."""
GATHER_COST = 16
"""Number of heads whose products with a row take as long as gathering it and adding its gradient (on a CPU)."""


def chosen_mask(chosen: Tensor, rows: int) -> Tensor:
    """Return the chosen indices int [B, S, K], -1 in unused slots, as a mask: bool [B, S, rows]."""
    mask = torch.zeros(*chosen.shape[:2], rows + 1, dtype=torch.bool, device=chosen.device)
    # Unused slots (-1) wrap around to the extra last column, which is cut off.
    return mask.scatter_(-1, chosen.long() % mask.shape[-1], True)[..., :-1]


class ChosenRows:
    """Indices of the rows of [B, T, c] that the queries chose, ``chosen`` int [B, S, K], -1 in unused slots.

    Blocks are slices of the B * S queries. Gathering one block at a time keeps memory from growing with S * K * c.
    """

    def __init__(self, rows: Tensor, chosen: Tensor):
        B, T, c = rows.shape
        offsets = torch.arange(0, B * T, max(T, 1), device=chosen.device).view(B, 1, 1)
        self.unused = (chosen < 0).flatten(0, 1)
        """bool [B * S, K]"""
        self._flat_rows = (chosen.clamp(min=0) + offsets).flatten(0, 1)
        self._queries = max(1, (_MAX_VALUES if rows.is_cpu else _MAX_VALUES_ON_GPU) // max(1, chosen.shape[-1] * c))

    def blocks(self) -> Iterator[slice]:
        """Yield consecutive blocks of queries whose chosen rows fit into the cache together."""
        for begin in range(0, len(self._flat_rows), self._queries):
            yield slice(begin, begin + self._queries)

    def gather(self, rows: Tensor, block: slice) -> Tensor:
        """Return the chosen rows of a block's queries: [B, T, c] -> [queries, K, c]. Unused slots hold row 0."""
        return F.embedding(self._flat_rows[block], rows.flatten(0, 1))

    def add(self, total: Tensor, block: slice, values: Tensor) -> None:
        """Add values [queries, K, c] to the rows of ``total`` [B, T, c] that the block's queries chose."""
        total.view(-1, total.shape[-1]).index_add_(0, self._flat_rows[block].flatten(), values.flatten(0, 1))
