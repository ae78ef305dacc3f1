"""How a forward pass outside training is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from model.config import ModelConfig
from model.errors import ConfigError

TILE = 16
"""Tokens that are computed together in batch-invariant mode: whole vector registers, so that no token falls to the
scalar code that finishes a loop and rounds differently."""

Mode = Literal["auto", "batch-invariant"]


@dataclass(frozen=True)
class Execution:
    """``mode`` of the passes outside training.

    ``auto`` takes the fastest operators that this machine has.
    ``batch-invariant`` computes a cached sequence's logits with the same bits alone, in a ragged batch, and however its
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

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError for widths at which batch-invariant mode could not keep its promise."""
        if not self.batch_invariant:
            return
        for name in _summed_widths(config):
            if getattr(config, name) % 4:
                # A CPU library computed some rows of a product in another order than others, at no multiple of 4 only.
                raise ConfigError(
                    f"execution: batch-invariant needs widths that are multiples of 4, model.{name} is "
                    f"{getattr(config, name)}"
                )

    def tokenwise(self, fn: Callable, owner: Any, *arguments: Any) -> Any:
        """``fn(owner, *arguments)`` for a function that treats every token on its own: in tiles of :data:`TILE` tokens
        in batch-invariant mode, a plain call otherwise.

        Tensors among the arguments, also within tuples and dicts, are [B, S, ...], or [1, S, ...] for all sequences
        alike; those returned are [B, S, ...].
        """
        if not self.batch_invariant:
            return fn(owner, *arguments)
        leaves, shape = tree_flatten(arguments)
        B, S = next(leaf for leaf in leaves if isinstance(leaf, Tensor)).shape[:2]

        def tiles(x: Any) -> Iterable:
            if not isinstance(x, Tensor):
                return repeat(x)
            return (tile.unsqueeze(0) for tile in in_tiles(x.expand(B, *x.shape[1:]).flatten(0, 1)))

        pieces = []
        for tile in zip(*map(tiles, leaves)):
            results, result_shape = tree_flatten(fn(owner, *tree_unflatten(tile, shape)))
            pieces.append(results)
        together = [torch.cat(part, dim=1)[0, : B * S].unflatten(0, (B, S)) for part in zip(*pieces)]
        return tree_unflatten(together, result_shape)


def _summed_widths(config: ModelConfig) -> list[str]:
    """The fields whose dims the network's products over weights and heads sum over."""
    names = ["hidden_size", "head_dim", "expert_size" if config.ffn == "moe" else "ffn_size"]
    if set(config.layers) != {"gqa"}:
        names += ["q_lora_rank", "o_lora_rank"]
    return names + (["index_head_dim"] if "csa" in config.layers else [])


def in_tiles(x: Tensor, tile: int = TILE) -> list[Tensor]:
    """[N, ...] in pieces [tile, ...], the last one padded with zeros."""
    missing = -len(x) % tile
    return list((torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x).split(tile))
