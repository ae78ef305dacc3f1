"""How a forward pass is computed: as it comes, compiled, or so that a sequence's bits do not depend on its company."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from types import FunctionType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from model.config import ModelConfig
from model.errors import ConfigError

TILE = 16
"""Tokens that are computed together where one shape must do: whole vector registers, so that no token falls to the
scalar code that finishes a loop and rounds differently."""

COMPILED_TILES = (1, 8, 64, 512)
"""Numbers of tokens that compiled code is made for. Code for any number was ten times as slow on a CPU."""

Mode = Literal["eager", "compiled", "batch-invariant"]


@dataclass(frozen=True)
class Execution:
    """``mode`` says what runs.

    ``compiled`` fuses what is done to each token on its own (torch.compile; outside training only). The first tokens
    wait for the compiler. ``batch-invariant`` computes a cached sequence's logits with the same bits alone, in a ragged
    batch, and however its tokens are cut into pieces: whatever has a sum in it runs at one fixed shape. Slower.

    Raises ConfigError for another mode.
    """

    mode: Mode = "eager"
    trains_compiled: bool = False
    """In training, compile what is done to each token on its own, for every length anew. Modes are for other passes."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"execution: '{self.mode}' is not one of {', '.join(get_args(Mode))}")

    @property
    def compiled(self) -> bool:
        return self.mode == "compiled"

    @property
    def batch_invariant(self) -> bool:
        return self.mode == "batch-invariant"

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError for widths at which the mode would not keep its word, or without the compiler it needs."""
        if self.compiled:
            compiler = os.environ.get("CXX", "g++")
            if shutil.which(compiler) is None:
                raise ConfigError(f"execution: compiled needs a C++ compiler; '{compiler}' (CXX) was not found")
        if not self.batch_invariant:
            return
        for name in _summed_widths(config):
            if getattr(config, name) % 4:
                # A CPU library computed some rows of a product in another order than others, at no multiple of 4 only.
                raise ConfigError(
                    f"execution: batch-invariant needs widths that are multiples of 4, model.{name} is "
                    f"{getattr(config, name)}"
                )

    @property
    def fixed_shapes(self) -> bool:
        return self.compiled or self.batch_invariant

    def function(self, fn: Callable, form: Hashable = None) -> Callable:
        """``fn``, compiled if that is asked for. ``form`` tells kinds of arguments apart that need code of their own,
        and nothing else does: what it leaves out must be the same in every call. Where none is given, tensors' shapes
        and dtypes and all other arguments are told apart. Compiled code also relies on strides."""
        if not self.compiled or torch.is_grad_enabled():
            return fn
        if form is not None:
            return _code(fn, form, *_state())

        def shaped(*arguments: Any) -> Any:
            arguments = tuple(x.contiguous() if isinstance(x, Tensor) else x for x in arguments)
            form = tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in arguments)
            return _code(fn, form, *_state())(*arguments)

        return shaped

    def in_stretches(self, input_ids: Tensor) -> bool:
        """Whether these tokens [B, S] are read as :mod:`model.decoding` does."""
        return self.compiled and input_ids.numel() == 1 and not torch.is_grad_enabled()

    def tokenwise(self, fn: Callable, form: Hashable, owner: Any, *arguments: Any) -> Any:
        """``fn(owner, *arguments)`` for a function that treats every token on its own. ``form`` as in :meth:`function`.

        Tensors among the arguments, also within tuples and dicts, are [B, S, ...], or [1, S, ...] for all sequences
        alike; those returned are [B, S, ...].
        """
        first = next(leaf for leaf in tree_flatten(arguments)[0] if isinstance(leaf, Tensor))
        B, S = first.shape[:2]
        if self.trains_compiled:
            return _guarded_code(fn, form)(owner, *arguments)
        if not self.fixed_shapes:
            return fn(owner, *arguments)
        most = TILE if self.batch_invariant else next((n for n in COMPILED_TILES if n >= B * S), COMPILED_TILES[-1])

        def tiles(x: Any) -> Iterable:
            if not isinstance(x, Tensor):
                return repeat(x)
            flat = x.expand(B, *x.shape[1:]).flatten(0, 1)
            return (tile.unsqueeze(0).contiguous() for tile in in_tiles(flat, most))

        function = self.function(fn, (form, most))
        leaves, shape = tree_flatten(arguments)
        pieces = []
        for tile in zip(*map(tiles, leaves)):
            results, result_shape = tree_flatten(function(owner, *tree_unflatten(tile, shape)))
            pieces.append(results)
        together = [
            part[0]
            if len(part) == 1 and part[0].shape[:2] == (B, S)
            else torch.cat(part, dim=1)[0, : B * S].unflatten(0, (B, S))
            for part in zip(*pieces)
        ]
        return tree_unflatten(together, result_shape)


def _summed_widths(config: ModelConfig) -> list[str]:
    """What the network's products over weights and heads sum over."""
    names = ["hidden_size", "head_dim", "expert_size" if config.ffn == "moe" else "ffn_size"]
    if set(config.layers) != {"gqa"}:
        names += ["q_lora_rank", "o_lora_rank"]
    return names + (["index_head_dim"] if "csa" in config.layers else [])


def few_sizes(n: int) -> int:
    """A size that is at least ``n``, one of few: code is compiled for each, and no more than twice what is asked for
    is computed where that costs anything."""
    size = 64
    while size < n:
        size *= 4 if size < 1024 else 2
    return size


def in_tiles(x: Tensor, tile: int = TILE) -> list[Tensor]:
    """[N, ...] in pieces [tile, ...], the last one filled up with zeros."""
    missing = -len(x) % tile
    return list((torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x).split(tile))


def _state() -> tuple[Hashable, ...]:
    """What compiled code depends on besides its arguments."""
    autocast = (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in ("cpu", "cuda"))
    return torch.is_inference_mode_enabled(), torch.get_num_threads(), *autocast


@cache
def _code(fn: Callable, form: Hashable, *state: Hashable) -> Callable:
    """``fn``, compiled for the first arguments it gets, and from then on called without a look at them. A look at all
    that a network is made of took as long as what is computed."""
    options: Any = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    return torch.compile(_copy(fn), dynamic=False, fullgraph=True, options=options)


@cache
def _guarded_code(fn: Callable, form: Hashable) -> Callable:
    """``fn``, compiled for whatever it meets, with a look at everything: in training, what is frozen changes, what is
    rounded, and how often it was so far."""
    return torch.compile(_copy(fn), dynamic=False, fullgraph=True)


def _copy(fn: Callable) -> Callable:
    """The compiler keeps what it made beside the code object, and would take it for every other form, too."""
    return FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
