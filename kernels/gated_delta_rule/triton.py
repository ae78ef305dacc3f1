"""The gated delta rule by Triton kernels, forward and backward, with the chunks of
:mod:`kernels.gated_delta_rule.eager`.

One kernel computes the products of queries and keys of all chunks at once; another carries the states through the
chunks and writes the outputs. The backward pass carries the states again, instead of keeping them, and the gradients of
the states from the last chunk to the first. Decays are never computed as a ratio; see
:mod:`kernels.gated_delta_rule.decayed_products`. Products split float32 operands into two BF16 numbers each, for a
relative error of about 2^-16.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.triton_support.platform import (
    ARCHITECTURES,
    NVIDIA,
    as_rows,
    is_interpreting,
    require_choice,
    require_device,
    require_shapes,
    split_precision,
)
from kernels.triton_support.tiles import Tile, Tiles, launch_best, padded_dim

CHUNK = 32
"""Tokens per chunk. States are stored for every chunk, so that all kernels need the same one."""
MAX_KEY_DIM = 128

PRODUCT_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"BLOCK_K": 16}),),
    **{name: (Tile(4, 1, {"BLOCK_K": 32}),) for name in ARCHITECTURES},
}
CARRY_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"BLOCK_V": 16}),),
    "sm_80": (Tile(8, 1, {"BLOCK_V": 32}),),
    "sm_90": (Tile(8, 1, {"BLOCK_V": 64}),),
    "sm_100": (Tile(8, 1, {"BLOCK_V": 64}),),
    "gfx942": (Tile(8, 1, {"BLOCK_V": 32}),),
}
_TOKEN_CHOICES = tuple(Tile(4, 1, {"BLOCK_K": size, "BLOCK_V": 32}) for size in (16, 32))
"""The first spills less; the second reads values less often."""
TOKEN_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"BLOCK_K": 16, "BLOCK_V": 16}),),
    **{name: _TOKEN_CHOICES for name in NVIDIA},
    "gfx942": _TOKEN_CHOICES[1:],
}


def merge_levels(chunk: int) -> int:
    """Return how often single tokens are merged in pairs into a chunk."""
    return chunk.bit_length() - 1


def supports(q: Tensor) -> bool:
    """Return whether the backend supports these queries on a GPU."""
    return q.dtype == torch.float32 and q.shape[-1] <= MAX_KEY_DIM


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    positions: Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.gated_delta_rule.gated_delta_rule` for float32. ``chunk_size`` changes nothing.

    Raises ValueError for other dtypes and for key dims above :data:`MAX_KEY_DIM`.
    """
    require_device("gated_delta_rule", q)
    require_choice("gated_delta_rule", "dtypes", q.dtype, (torch.float32,))
    if q.shape[3] > MAX_KEY_DIM:
        raise ValueError(
            f"gated_delta_rule: the triton backend supports key dims up to {MAX_KEY_DIM}; found {q.shape[3]}"
        )
    (B, S, H, K), V = q.shape, v.shape[-1]
    shapes = {"k": (k, (B, S, H, K)), "v": (v, (B, S, H, V)), "g": (g, (B, S, H, K)), "beta": (beta, (B, S, H))}
    require_shapes("gated_delta_rule", **shapes, state=(state, (B, H, K, V)), positions=(positions, (B, S)))
    if state is None:
        state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[3])
    return _Rule.apply(q, *(x.float() for x in (k, v, g, beta, state)), positions)


@dataclass(frozen=True)
class _Inputs:
    """Inputs in the form that the kernels take. q, k, v and g are rows [batch * S, ...], with gaps between them or
    not."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor
    positions: Tensor | None

    @classmethod
    def of(cls, q, k, v, g, beta, state, positions) -> _Inputs:
        q, k, v, g = (as_rows(x) for x in (q, k, v, g))
        return cls(
            q, k, v, g, beta.contiguous(), state.contiguous(), None if positions is None else positions.contiguous()
        )

    @property
    def chunk(self) -> int:
        return 16 if is_interpreting() else CHUNK

    @property
    def chunks(self) -> int:
        return -(-self.sizes[0] // self.chunk)

    @property
    def batch(self) -> int:
        return len(self.state)

    @property
    def documents(self) -> Tensor:
        """Positions, or a tensor that is not read."""
        return self.beta if self.positions is None else self.positions

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Tokens, heads, key dim and value dim."""
        rows, H, K = self.q.shape
        return rows // self.batch, H, K, self.v.shape[2]

    def strides(self, names: str) -> tuple[int, ...]:
        return tuple(getattr(self, name).stride(0) for name in names)

    def options(self, tile: Tile, **constants: int) -> dict[str, Any]:
        flags = {"HAS_POSITIONS": self.positions is not None, "PRECISION": split_precision(), "L": self.chunk}
        return {**flags, **constants, **tile.options}

    @property
    def merges(self) -> dict[str, int]:
        return {"LEVELS": merge_levels(self.chunk)}

    @property
    def whole_keys(self) -> dict[str, int]:
        return {"K_PAD": padded_dim(self.sizes[2])}

    def launch(self, name: str, tiles: Tiles, run) -> Any:
        return launch_best(f"gated_delta_rule.{name}", tiles, (self.batch, *self.sizes), self.q.device, run)


def _kernels() -> Any:
    return importlib.import_module("kernels.gated_delta_rule.triton_kernels")


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, positions):
        given = _Inputs.of(q, k, v, g, beta, state, positions)
        inverse, weights = _products(given)
        out, last = _carry(given, inverse, weights, keep=False)
        ctx.save_for_backward(q, k, v, g, beta, state, positions, inverse, weights)
        return out, last

    @staticmethod
    def backward(ctx, grad_out, grad_last):
        *tensors, inverse, weights = ctx.saved_tensors
        given = _Inputs.of(*tensors)
        grad_out = grad_out.contiguous()
        states, changes = _carry(given, inverse, weights, keep=True)
        grad_states, grad_errors = _carry_gradients(given, inverse, weights, grad_out, grad_last.contiguous())
        gradients = _token_gradients(given, states, changes, grad_states, grad_errors, grad_out)
        return *(grad.view_as(x) for grad, x in zip(gradients, tensors)), grad_states[:, 0], None


def _products(given: _Inputs) -> tuple[Tensor, Tensor]:
    """Return T and M of all chunks, [batch, chunks, H, L, L] each."""
    batch, (S, H, K, _) = given.batch, given.sizes

    def run(tile: Tile) -> tuple[Tensor, Tensor]:
        inverse, weights = (given.q.new_empty(batch, given.chunks, H, given.chunk, given.chunk) for _ in range(2))
        _kernels().products[(given.chunks, H, batch)](
            given.q, given.k, given.g, given.beta, given.documents, inverse, weights,
            S, H, K, *given.strides("qkg"), **given.options(tile, **given.merges),
        )  # fmt: skip
        return inverse, weights

    return given.launch("products", PRODUCT_TILES, run)


def _carry(given: _Inputs, inverse: Tensor, weights: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Return the outputs and the last state, or with ``keep`` all states and the changes of all tokens."""
    batch, (S, H, K, V) = given.batch, given.sizes

    def run(tile: Tile) -> tuple[Tensor, Tensor]:
        rows = given.q.new_empty(batch, S, H, V)
        states = given.q.new_empty(batch, *((given.chunks + 1,) if keep else ()), H, K, V)
        _kernels().carry[(-(-V // tile.sizes["BLOCK_V"]), H, batch)](
            given.q, given.k, given.v, given.g, given.beta, given.documents, given.state, inverse, weights,
            rows, states, states, rows, S, H, K, V, *given.strides("qkvg"), KEEP=keep,
            **given.options(tile, **given.whole_keys),
        )  # fmt: skip
        return (states, rows) if keep else (rows, states)

    return given.launch(f"carry {'states' if keep else 'forward'}", CARRY_TILES, run)


def _carry_gradients(given: _Inputs, inverse: Tensor, weights: Tensor, grad_out: Tensor, grad_last: Tensor):
    """Return the gradients of all states, and of the right sides of all chunks' systems [batch, S, H, V]."""
    batch, (S, H, K, V) = given.batch, given.sizes

    def run(tile: Tile) -> tuple[Tensor, Tensor]:
        grad_states, grad_errors = given.q.new_empty(batch, given.chunks + 1, H, K, V), torch.empty_like(grad_out)
        _kernels().carry_gradients[(-(-V // tile.sizes["BLOCK_V"]), H, batch)](
            given.q, given.k, given.g, given.beta, given.documents, grad_last, inverse, weights, grad_out,
            grad_states, grad_errors, S, H, K, V, *given.strides("qkg"), **given.options(tile, **given.whole_keys),
        )  # fmt: skip
        return grad_states, grad_errors

    return given.launch("carry backward", CARRY_TILES, run)


def _token_gradients(
    given: _Inputs, states: Tensor, changes: Tensor, grad_states: Tensor, grad_errors: Tensor, grad_out: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, g and beta."""
    batch, (S, H, K, V) = given.batch, given.sizes

    def run(tile: Tile) -> tuple[Tensor, ...]:
        tensors = given.q, given.k, given.v, given.g, given.beta
        gradients = [given.q.new_empty(x.shape) for x in tensors]
        _kernels().token_gradients[(given.chunks, H, batch)](
            *tensors, given.documents, states, changes, grad_states, grad_errors, grad_out, *gradients,
            S, H, K, V, *given.strides("qkvg"), **given.options(tile, **given.merges),
        )  # fmt: skip
        return tuple(gradients)

    return given.launch("token_gradients", TOKEN_TILES, run)
