"""The state-space scan by Triton kernels, forward and backward, with the chunks of :mod:`kernels.ssd_scan.eager`.

One kernel carries the states through the chunks, one after another; another computes the outputs of all chunks at once.
The backward pass carries the states again, instead of keeping them, and the gradients of the states from the last chunk
to the first. Products split float32 operands into two BF16 numbers each, for a relative error of about 2^-16.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.triton_support.platform import (
    as_rows,
    require_choice,
    require_device,
    require_shapes,
    split_precision,
)
from kernels.triton_support.tiles import Tile, Tiles, launch_best, padded_dim, settings_for

CHUNKS = {"interpreter": 16, "sm_80": 32, "sm_90": 64, "sm_100": 64, "gfx942": 64}
"""Tokens per chunk. States are stored for every chunk, so that all kernels on a GPU need the same number."""
MAX_HEAD_DIM = 128

CARRY_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"L": CHUNKS["interpreter"], "BLOCK_P": 16, "BLOCK_N": 16}),),
    "sm_80": (Tile(4, 2, {"L": CHUNKS["sm_80"], "BLOCK_P": 64, "BLOCK_N": 64}),),
    "sm_90": (Tile(8, 2, {"L": CHUNKS["sm_90"], "BLOCK_P": 64, "BLOCK_N": 64}),),
    "sm_100": (Tile(8, 2, {"L": CHUNKS["sm_100"], "BLOCK_P": 64, "BLOCK_N": 64}),),
    "gfx942": (Tile(4, 1, {"L": CHUNKS["gfx942"], "BLOCK_P": 64, "BLOCK_N": 64}),),
}
CHUNK_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"L": CHUNKS["interpreter"], "BLOCK_N": 16}),),
    "sm_80": (Tile(4, 1, {"L": CHUNKS["sm_80"], "BLOCK_N": 32}),),
    "sm_90": (Tile(8, 1, {"L": CHUNKS["sm_90"], "BLOCK_N": 32}),),
    "sm_100": (Tile(8, 1, {"L": CHUNKS["sm_100"], "BLOCK_N": 32}),),
    "gfx942": (Tile(8, 1, {"L": CHUNKS["gfx942"], "BLOCK_N": 32}),),
}
"""Settings of the kernels whose programs have one chunk and one head each."""
GROUP_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"L": CHUNKS["interpreter"], "BLOCK_P": 16, "BLOCK_N": 16}),),
    "sm_80": (Tile(4, 1, {"L": CHUNKS["sm_80"], "BLOCK_P": 32, "BLOCK_N": 32}),),
    "sm_90": (Tile(8, 1, {"L": CHUNKS["sm_90"], "BLOCK_P": 16, "BLOCK_N": 64}),),
    "sm_100": (Tile(8, 1, {"L": CHUNKS["sm_100"], "BLOCK_P": 32, "BLOCK_N": 64}),),
    "gfx942": (Tile(8, 1, {"L": CHUNKS["gfx942"], "BLOCK_P": 32, "BLOCK_N": 32}),),
}


def supports(x: Tensor) -> bool:
    """Return whether the backend supports this input on a GPU."""
    return x.dtype == torch.float32 and x.shape[-1] <= MAX_HEAD_DIM


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None = None,
    positions: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.ssd_scan.ssd_scan` for float32. ``chunk_size`` changes nothing.

    Raises ValueError for other dtypes and for head dims above :data:`MAX_HEAD_DIM`.
    """
    require_device("ssd_scan", x)
    require_choice("ssd_scan", "dtypes", x.dtype, (torch.float32,))
    if x.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"ssd_scan: the triton backend supports head dims up to {MAX_HEAD_DIM}; found {x.shape[3]}")
    (batch, S, H, P), (G, N) = x.shape, B.shape[2:]
    if H % G:
        raise ValueError(f"ssd_scan: {H} heads do not divide into {G} groups")
    shapes = {"dt": (dt, (batch, S, H)), "A": (A, (H,)), "B": (B, (batch, S, G, N)), "C": (C, (batch, S, G, N))}
    require_shapes(
        "ssd_scan", **shapes, D=(D, (H,)), state=(state, (batch, H, P, N)), positions=(positions, (batch, S))
    )
    if state is None:
        state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])
    return _Scan.apply(x, *(z.float() for z in (dt, A, B, C, D, state)), positions)


@dataclass(frozen=True)
class _Inputs:
    """Inputs in the form that the kernels take. x, B and C are rows [batch * S, ...], with gaps between them or not."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    state: Tensor
    positions: Tensor | None

    @classmethod
    def of(cls, x, dt, A, B, C, D, state, positions) -> _Inputs:
        x, B, C = (as_rows(z) for z in (x, B, C))
        dt, A, D, state = (z.contiguous() for z in (dt, A, D, state))
        return cls(x, dt, A, B, C, D, state, None if positions is None else positions.contiguous())

    @property
    def chunk(self) -> int:
        """Tokens per chunk."""
        return settings_for(CARRY_TILES, self.x.device)[0].sizes["L"]

    @property
    def chunks(self) -> int:
        return -(-self.sizes[0] // self.chunk)

    @property
    def batch(self) -> int:
        return len(self.state)

    @property
    def decays(self) -> tuple[Tensor, Tensor]:
        return self.dt, self.A

    @property
    def documents(self) -> Tensor:
        """Positions, or a tensor that is not read."""
        return self.dt if self.positions is None else self.positions

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens, heads, heads per group, head dim and state size."""
        (rows, H, P), (groups, N) = self.x.shape, self.B.shape[1:]
        return rows // self.batch, H, H // groups, P, N

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.x.stride(0), self.B.stride(0), self.C.stride(0)

    def options(self, tile: Tile, *, whole_heads: bool = True) -> dict[str, Any]:
        constants = {"HAS_POSITIONS": self.positions is not None, "PRECISION": split_precision()}
        if whole_heads:
            constants["P_PAD"] = padded_dim(self.sizes[3])
        return {**constants, **tile.options}

    def launch(self, name: str, tiles: Tiles, run) -> Any:
        return launch_best(f"ssd_scan.{name}", tiles, (self.batch, *self.sizes), self.x.device, run)


def _kernels() -> Any:
    return importlib.import_module("kernels.ssd_scan.triton_kernels")


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, positions):
        given = _Inputs.of(x, dt, A, B, C, D, state, positions)
        batch, (S, H, _, P, _) = given.batch, given.sizes
        states = _carry(given, given.x, given.B, given.state, reverse=False)

        def run(tile: Tile) -> Tensor:
            y = x.new_empty(batch, S, H, P)
            _kernels().outputs[(given.chunks, H, batch)](
                given.x, *given.decays, given.B, given.C, given.D, given.documents, states, y,
                *given.sizes, *given.strides, **given.options(tile),
            )  # fmt: skip
            return y

        y = given.launch("outputs", CHUNK_TILES, run)
        ctx.save_for_backward(x, dt, A, B, C, D, state, positions, y)
        return y, states[:, -1].clone()

    @staticmethod
    def backward(ctx, grad_y, grad_last):
        *tensors, y = ctx.saved_tensors
        given = _Inputs.of(*tensors)
        grad_y = as_rows(grad_y.contiguous())
        states = _carry(given, given.x, given.B, given.state, reverse=False)
        grad_states = _carry(given, grad_y, given.C, grad_last.contiguous(), reverse=True)
        grad_x, grad_dt, grad_logs, grad_D = _token_gradients(given, states, grad_states, y, grad_y)
        grad_B, grad_C = _group_gradients(given, states, grad_states, grad_y)
        grad_A = (grad_logs * given.dt).sum((0, 1))
        grad_B, grad_C = (grad.view_as(z) for grad, z in zip((grad_B, grad_C), tensors[3:5]))
        return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_states[:, 0], None


def _carry(given: _Inputs, rows: Tensor, columns: Tensor, start: Tensor, reverse: bool) -> Tensor:
    """Return the states, or with ``reverse`` their gradients: [batch, chunks + 1, H, P, N]."""
    batch, (_, H, _, P, N) = given.batch, given.sizes

    def run(tile: Tile) -> Tensor:
        states = given.x.new_empty(batch, given.chunks + 1, H, P, N)
        parts = -(-P // tile.sizes["BLOCK_P"]) * -(-N // tile.sizes["BLOCK_N"])
        _kernels().carry[(parts, H, batch)](
            rows, columns, *given.decays, given.documents, start, states,
            *given.sizes, rows.stride(0), columns.stride(0), REVERSE=reverse,
            **given.options(tile, whole_heads=False),
        )  # fmt: skip
        return states

    return given.launch(f"carry {'backward' if reverse else 'forward'}", CARRY_TILES, run)


def _token_gradients(given: _Inputs, states: Tensor, grad_states: Tensor, y: Tensor, grad_y: Tensor):
    """Return the gradients of x, dt, dt * A and D."""
    batch, H = given.batch, given.sizes[1]

    def run(tile: Tile) -> tuple[Tensor, ...]:
        grad_x, grad_dt, grad_logs = torch.empty_like(y), torch.empty_like(given.dt), torch.empty_like(given.dt)
        grad_D = y.new_empty(batch, given.chunks, H)
        _kernels().token_gradients[(given.chunks, H, batch)](
            given.x, *given.decays, given.B, given.C, given.D, given.documents, states, grad_states, y, grad_y,
            grad_x, grad_dt, grad_logs, grad_D, *given.sizes, *given.strides, **given.options(tile),
        )  # fmt: skip
        return grad_x, grad_dt, grad_logs, grad_D.sum((0, 1))

    return given.launch("token_gradients", CHUNK_TILES, run)


def _group_gradients(given: _Inputs, states: Tensor, grad_states: Tensor, grad_y: Tensor):
    """Return the gradients of B and C."""
    batch, (_, H, share, _, N) = given.batch, given.sizes

    def run(tile: Tile) -> tuple[Tensor, Tensor]:
        grad_B, grad_C = (given.x.new_empty(given.B.shape) for _ in range(2))
        parts = H // share * -(-N // tile.sizes["BLOCK_N"])
        _kernels().group_gradients[(given.chunks, parts, batch)](
            given.x, *given.decays, given.B, given.C, given.documents, states, grad_states, grad_y, grad_B, grad_C,
            *given.sizes, *given.strides, **given.options(tile, whole_heads=False),
        )  # fmt: skip
        return grad_B, grad_C

    return given.launch("group_gradients", GROUP_TILES, run)
