"""Execution of forward passes outside training, and the token tiles of batch-invariant mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from model.errors import ConfigError

TOKEN_TILE = 16
"""Tokens computed together in batch-invariant mode: whole vector registers, because the scalar code for a remainder
rounds differently."""

Mode = Literal["auto", "batch-invariant"]


@dataclass(frozen=True)
class Execution:
    """Execution mode of forward passes outside training.

    ``auto`` takes the fastest operators of this machine.
    ``batch-invariant`` gives a cached sequence the same logits, bit for bit, alone or in a ragged batch, however its
    tokens are cut into pieces: all sums run at one fixed shape. Slower.

    Raises ConfigError for another mode.
    """

    mode: Mode = "auto"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"execution: '{self.mode}' is not one of {', '.join(get_args(Mode))}")

    @property
    def batch_invariant(self) -> bool:
        return self.mode == "batch-invariant"


def in_tiles(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(*arguments)`` for a function that treats every token alone, computed in tiles of
    :data:`TOKEN_TILE` tokens.

    Tensors among the arguments, also within tuples and dicts, are [B, S, ...], or [1, S, ...] if all sequences share
    them. Tensors in the result are [B, S, ...].
    """
    leaves, structure = tree_flatten(arguments)
    B, S = next(leaf for leaf in leaves if isinstance(leaf, Tensor)).shape[:2]

    def tiles(x: Any) -> Iterable:
        if not isinstance(x, Tensor):
            return repeat(x)
        tokens = x.expand(B, *x.shape[1:]).flatten(0, 1).contiguous()  # if S is 1, a view of one row
        return (tile.unsqueeze(0) for tile in split_tokens(tokens))

    pieces = []
    for tile in zip(*map(tiles, leaves)):
        results, result_structure = tree_flatten(function(*tree_unflatten(tile, structure)))
        pieces.append(results)

    def joined(parts: tuple) -> Any:
        if not isinstance(parts[0], Tensor):
            return parts[0]
        return torch.cat(parts, dim=1)[0, : B * S].unflatten(0, (B, S))

    return tree_unflatten([joined(parts) for parts in zip(*pieces)], result_structure)


def split_tokens(x: Tensor) -> list[Tensor]:
    """Split x [N, ...] into pieces [:data:`TOKEN_TILE`, ...], the last one padded with zeros."""
    missing = -len(x) % TOKEN_TILE
    return list((torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x).split(TOKEN_TILE))
