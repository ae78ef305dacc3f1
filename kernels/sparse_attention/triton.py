"""Attention within whole sequences by Triton kernels, forward and backward.

Scores stay on the chip: memory grows neither with S * window nor with S * T. The backward pass and the returned mass
recompute them. Many queries add to the gradient of one key. By default they do so with atomic additions, whose
order varies; within :func:`deterministic_gradients`, and under ``torch.use_deterministic_algorithms``, every program
writes its part, and the parts of a key are added in a fixed order.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.autocast import in_float32, product_dtype
from kernels.entry_ranges import EntryRanges
from kernels.sparse_attention.blocks import LOG2_E
from kernels.sparse_attention.mass import EntryMass
from kernels.triton_support.platform import (
    ARCHITECTURES,
    check_selection,
    is_interpreting,
    on_device_of,
    require_choice,
    require_device,
    require_shapes,
)
from kernels.triton_support.tiles import Tile, Tiles, launch_best

HEAD_DIMS = (32, 64, 128, 256, 512)
DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes of products. The interpreter also computes float32."""
_MAX_PART_BYTES = 1 << 28
"""Maximum scratch memory of deterministic gradients, exceeded only if a single block of queries needs more."""
_EVERY = slice(None)
_is_deterministic = False

FORWARD_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"rows": 16, "BLOCK_N": 16}),),
    "sm_80": (Tile(8, 2, {"rows": 64, "BLOCK_N": 32}),),
    "sm_90": (Tile(8, 2, {"rows": 64, "BLOCK_N": 32}), Tile(8, 3, {"rows": 64, "BLOCK_N": 32})),
    "sm_100": (Tile(8, 2, {"rows": 64, "BLOCK_N": 32}),),
    "gfx942": (Tile(4, 1, {"rows": 32, "BLOCK_N": 32}),),
}
MASS_TILES: Tiles = FORWARD_TILES
BACKWARD_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"rows": 16, "BLOCK_N": 16, "passes": 1}),),
    "sm_80": (Tile(8, 1, {"rows": 32, "BLOCK_N": 32, "passes": 1}),),
    "sm_90": (Tile(8, 2, {"rows": 64, "BLOCK_N": 32, "passes": 2}),),
    "sm_100": (Tile(8, 1, {"rows": 32, "BLOCK_N": 32, "passes": 1}),),
    "gfx942": (Tile(4, 1, {"rows": 16, "BLOCK_N": 16, "passes": 1}),),
}
"""With two passes, the gradients of queries and of keys are computed by a launch each, and the scores twice: 7 products
instead of 5. Both at once do not fit the registers at 64 rows, the least for the widest matrix instructions. On sm_100
the gradient of the queries does not fit the tensor memory at 64 rows."""
KEY_STAGES = 1
"""Stages of the pass of keys: the shared memory has no room for a second one."""


SUM_TILES: Tiles = {name: (Tile(4, 1),) for name in ARCHITECTURES}


@contextlib.contextmanager
def deterministic_gradients() -> Iterator[None]:
    """Context manager: backward passes within it produce the same bits every time."""
    global _is_deterministic
    before, _is_deterministic = _is_deterministic, True
    try:
        yield
    finally:
        _is_deterministic = before


def adds_in_fixed_order() -> bool:
    """Return whether gradients must have the same bits every time."""
    return _is_deterministic or torch.are_deterministic_algorithms_enabled()


def supports(query: Tensor, entries: Tensor | None, value_size: int) -> bool:
    """Return whether the backend supports these inputs on a GPU."""
    c = query.shape[-1]
    is_shared = entries is None or entries.dim() == 3
    return is_shared and c in HEAD_DIMS and value_size == c and product_dtype(query) in DTYPES


def sparse_attention(
    query: Tensor,
    window_kv: Tensor | None,
    entries: Tensor | None,
    entry_mask: Tensor | EntryRanges | None,
    sink: Tensor,
    window: int,
    reach: Tensor | None,
    scale: float,
    value_size: int,
    chosen: Tensor | None = None,
) -> tuple[Tensor, EntryMass | None]:
    """Implement :func:`kernels.sparse_attention.sparse_attention` for entries [B, T, c] and ``value_size == c``.

    Raises ValueError for unsupported inputs.
    """
    name = "sparse_attention"
    require_device(name, query)
    require_choice(name, "head dims", query.shape[-1], HEAD_DIMS)
    require_choice(name, "value sizes", value_size, (query.shape[-1],))
    dtype = product_dtype(query)
    require_choice(name, "dtypes", dtype, (*DTYPES, torch.float32) if is_interpreting() else DTYPES)
    if entries is not None and entries.dim() != 3:
        raise ValueError(f"{name}: the triton backend supports entries [B, T, c]; pass gathered ones as chosen")
    if entries is None or not entries.shape[1] or (chosen is not None and not chosen.shape[2]):
        entries = entry_mask = chosen = None
    if isinstance(entry_mask, Tensor) and chosen is None:
        raise ValueError(f"{name}: the triton backend supports ranges of entries; pass those of a mask as chosen")
    ranges = entry_mask if chosen is None and isinstance(entry_mask, EntryRanges) else None
    (B, S, H, c), past = query.shape, 0 if window_kv is None else window_kv.shape[1]
    require_shapes(
        name,
        window_kv=(window_kv, (B, max(S, past), c)),
        entries=(entries, (B, 0 if entries is None else entries.shape[1], c)),
        sink=(sink, (H,)),
        first=(None if ranges is None else ranges.first, ((B, 1), S)),
        end=(None if ranges is None else ranges.end, ((B, 1), S)),
        chosen=(chosen, (B, S, 0 if chosen is None else chosen.shape[-1])),
    )
    if chosen is not None and entries is not None:
        check_selection(name, chosen, entries.shape[1])
    with in_float32(query):
        out, log_sum = _Attention.apply(query, window_kv, entries, sink, ranges, chosen, window, reach, dtype, scale)
    if entries is None:
        return out, None
    return out, _RecomputedMass(query.detach(), entries.detach(), ranges, chosen, dtype, scale, log_sum)


@dataclass(frozen=True)
class _Keys:
    """Keys and visibility in the form that the kernels take. Absent tensors are replaced by one that is not read."""

    window_kv: Tensor
    entries: Tensor
    chosen: Tensor
    firsts: Tensor
    ends: Tensor
    reach: Tensor
    past: int
    window: int
    T: int
    K: int
    mode: int
    has_window: bool
    has_reach: bool

    @classmethod
    def of(cls, query, window_kv, entries, ranges, chosen, window, reach, dtype) -> _Keys:
        B, S = query.shape[:2]
        unread = query.new_empty(1, dtype=dtype)
        integers = query.new_empty(1, dtype=torch.int32)
        firsts, ends = (integers, integers) if ranges is None else (x.to(torch.int32).contiguous() for x in ranges)
        return cls(
            unread if window_kv is None else window_kv.to(dtype).contiguous(),
            unread if entries is None else entries.to(dtype).contiguous(),
            integers if chosen is None else chosen.to(torch.int32).contiguous(),
            firsts,
            ends,
            integers if reach is None else reach.expand(B, S).to(torch.int32).contiguous(),
            0 if window_kv is None else window_kv.shape[1] - S,
            window,
            0 if entries is None else entries.shape[1],
            0 if chosen is None else chosen.shape[2],
            0 if entries is None else 1 if chosen is not None else 2,
            window_kv is not None,
            reach is not None,
        )

    @property
    def slots(self) -> int:
        """Maximum number of entries that a program visits."""
        return self.K if self.mode == 1 else self.T

    @property
    def range_stride(self) -> int:
        """Stride of the ranges between sequences: 0 where these share one."""
        return self.ends.shape[-1] if self.mode == 2 and len(self.ends) > 1 else 0

    def flags(self) -> dict[str, bool | int]:
        return {
            "HAS_WINDOW": self.has_window,
            "HAS_REACH": self.has_reach,
            "MODE": self.mode,
            "UPCAST": is_interpreting(),
        }

    def blocks(self, H: int, tile: Tile) -> dict[str, int]:
        """Return block sizes: as many heads as a tile has rows, and where there are fewer heads, several queries."""
        rows = tile.sizes["rows"]
        heads = min(rows, max(16 if self.mode == 1 else 1, 1 << (H - 1).bit_length()))
        return {
            "BLOCK_Q": 1 if self.mode == 1 else rows // heads,
            "BLOCK_H": heads,
            "BLOCK_N": tile.sizes["BLOCK_N"],
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


class _Attention(torch.autograd.Function):
    """Returns the output and the base-2 logarithms of the softmaxes' sums, float32 [B, S, H]."""

    @staticmethod
    def forward(ctx, query, window_kv, entries, sink, ranges, chosen, window, reach, dtype, scale):
        kernels = importlib.import_module("kernels.sparse_attention.triton_kernels")
        B, S, H, c = query.shape
        keys = _Keys.of(query, window_kv, entries, ranges, chosen, window, reach, dtype)
        q = query.to(dtype).contiguous()
        bias = sink.float().mul(LOG2_E).contiguous()
        shape = (B * S, H, c, keys.mode, keys.slots, dtype)

        def attend(tile: Tile) -> tuple[Tensor, Tensor]:
            out = torch.empty_like(q, dtype=query.dtype)
            log_sum = query.new_empty(B, S, H, dtype=torch.float32)
            blocks = keys.blocks(H, tile)
            grid = (-(-S // blocks["BLOCK_Q"]), -(-H // blocks["BLOCK_H"]), B)
            kernels.forward[grid](
                q, keys.window_kv, keys.entries, keys.chosen, keys.firsts, keys.ends, bias, keys.reach, out, log_sum,
                S, H, keys.past, window, keys.T, keys.K, keys.range_stride, scale * LOG2_E,
                D=c, **keys.flags(), **blocks,
            )  # fmt: skip
            return out, log_sum

        out, log_sum = launch_best("sparse_attention.forward", FORWARD_TILES, shape, query.device, attend)
        ctx.keys, ctx.scale, ctx.shape = keys, scale, shape
        ctx.dtypes = [None if x is None else x.dtype for x in (query, window_kv, entries, sink)]
        ctx.save_for_backward(q, out, log_sum, bias)
        ctx.mark_non_differentiable(log_sum)
        return out, log_sum

    @staticmethod
    def backward(ctx, grad_out, _):
        q, out, log_sum, bias = ctx.saved_tensors
        upstream = grad_out.to(q.dtype).contiguous()
        inner = (grad_out.float() * out.float()).sum(-1)
        grad_sink = -((bias - log_sum).exp2() * inner).sum((0, 1))
        gradients = _backward(ctx.keys, q, upstream, log_sum, inner, ctx.scale, ctx.shape)
        cast = (None if d is None else g.to(d) for g, d in zip((*gradients, grad_sink), ctx.dtypes))
        return *cast, *[None] * 6


class _RecomputedMass:
    """The attention mass, recomputed from the logarithms of the softmaxes' sums for the queries that are read."""

    def __init__(self, query, entries, ranges, chosen, dtype, scale, log_sum):
        self._query, self._log_sum, self._dtype, self._scale = query, log_sum, dtype, scale
        self._keys = _Keys.of(query, None, entries, ranges, chosen, 0, None, dtype)

    def of(self, queries: slice = _EVERY) -> Tensor:
        kernels = importlib.import_module("kernels.sparse_attention.triton_kernels")
        keys, (B, S, H, c) = self._keys, self._query.shape
        begin, end, _ = queries.indices(S)
        q = self._query[:, begin:end].to(self._dtype).contiguous()

        def run(tile: Tile) -> Tensor:
            mass = q.new_empty(B, end - begin, keys.slots, dtype=torch.float32)
            blocks = keys.blocks(H, tile)
            kernels.entry_mass[(-(-(end - begin) // blocks["BLOCK_Q"]), 1, B)](
                q, keys.entries, keys.chosen, keys.firsts, keys.ends, self._log_sum, mass,
                begin, end - begin, S, H, keys.T, keys.K, keys.range_stride, self._scale * LOG2_E,
                D=c, MODE=keys.mode, UPCAST=is_interpreting(), **blocks,
            )  # fmt: skip
            return mass

        shape = (B * (end - begin), H, c, keys.mode, keys.slots, self._dtype)
        return launch_best("sparse_attention.entry_mass", MASS_TILES, shape, q.device, run)


def _backward(keys: _Keys, q: Tensor, upstream: Tensor, log_sum: Tensor, inner: Tensor, scale: float, shape: tuple):
    """Return the gradients of queries, window rows and entries. The latter two are float32."""
    kernels = importlib.import_module("kernels.sparse_attention.triton_kernels")
    B, S, H, c = q.shape
    is_atomic = not adds_in_fixed_order()

    def run(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        grad_query = torch.empty_like(q)
        grad_window, grad_entries = (torch.zeros_like(x, dtype=torch.float32) for x in (keys.window_kv, keys.entries))
        blocks = keys.blocks(H, tile)
        Q, N = blocks["BLOCK_Q"], blocks["BLOCK_N"]
        heads = -(-H // blocks["BLOCK_H"])
        # Programs visit whole tiles of keys.
        window_slots = -(-(keys.window + Q - 1) // N) * N if keys.has_window else 0
        slots = window_slots + -(-keys.slots // N) * N
        step = -(-S // Q) * Q
        if not is_atomic:
            step = max(1, _MAX_PART_BYTES // (4 * B * heads * slots * c)) * Q
        for begin in range(0, S, step):
            programs = -(-min(step, S - begin) // Q)
            parts = grad_window if is_atomic else q.new_empty(B * heads * programs * slots, c, dtype=torch.float32)
            for of_query, of_keys in [(True, True)] if tile.sizes["passes"] == 1 else [(True, False), (False, True)]:
                settings = blocks if of_query else {**blocks, "num_stages": KEY_STAGES}
                kernels.backward[(programs, heads, B)](
                    q, keys.window_kv, keys.entries, keys.chosen, keys.firsts, keys.ends, keys.reach, upstream,
                    log_sum, inner, grad_query, grad_window, grad_entries, parts,
                    begin, S, H, keys.past, keys.window, keys.T, keys.K, keys.range_stride, window_slots, slots,
                    scale * LOG2_E, scale,
                    D=c, **keys.flags(), ATOMIC=is_atomic, OF_QUERY=of_query, OF_KEYS=of_keys, **settings,
                )  # fmt: skip
            if not is_atomic:
                parts = parts.view(B, heads, programs, slots, c)
                _sum_parts(keys, parts, begin, Q, S, window_slots, (grad_window, grad_entries))
        return grad_query, grad_window, grad_entries

    return launch_best("sparse_attention.backward", BACKWARD_TILES, (*shape, is_atomic), q.device, run)


def _sum_parts(
    keys: _Keys, parts: Tensor, begin: int, Q: int, S: int, window_slots: int, gradients: tuple[Tensor, Tensor]
) -> None:
    """Add parts [B, groups of heads, programs, slots, c] to the gradients of window rows and of entries.

    A program has ``Q`` queries, the first one from query ``begin``. Its slots are ``window_slots`` rows of the window,
    then entries.
    """
    kernels = importlib.import_module("kernels.sparse_attention.triton_kernels")
    device, (B, heads, programs, slots, c) = parts.device, parts.shape
    first = begin + torch.arange(programs, device=device) * Q
    sequence = torch.arange(B, device=device).view(B, 1, 1, 1)
    unused = torch.iinfo(torch.int64).max
    targets = torch.full((B, heads, programs, slots), unused, device=device)
    if keys.has_window:
        rows = keys.past + S
        j = keys.past + first.unsqueeze(1) - keys.window + 1 + torch.arange(window_slots, device=device)
        inside = (j >= 0) & (j < rows)
        targets[..., :window_slots] = torch.where(inside, sequence * rows + j, unused)
    window_rows = B * (keys.past + S) if keys.has_window else 0
    if keys.mode:
        if keys.mode == 1:
            entry = keys.chosen[:, begin : begin + programs].unsqueeze(1).long()
            inside = (entry >= 0) & (entry < keys.T)
        else:
            entry = torch.arange(keys.T, device=device).view(1, 1, 1, -1)
            extra = max(0, begin + programs * Q - S)
            # A program writes the parts of whole tiles from the first to the last entry that one of its queries sees.
            first, last = (
                torch.nn.functional.pad(x.expand(B, S)[:, begin : begin + programs * Q], (0, extra), value=value)
                .unflatten(1, (programs, Q))
                .view(B, 1, programs, 1, Q)
                for x, value in ((keys.firsts, keys.T), (keys.ends, 0))
            )
            inside = (entry >= first.amin(-1)) & (entry < last.amax(-1))
        at = window_rows + sequence * keys.T + entry
        targets[..., window_slots : window_slots + keys.slots] = torch.where(inside, at, unused)
    targets, order = targets.flatten().sort(stable=True)
    for first_row, gradient in zip((0, window_rows), gradients):
        count = gradient.numel() // c if gradient.dim() == 3 else 0
        if count:
            offsets = torch.searchsorted(targets, torch.arange(first_row, first_row + count + 1, device=device))
            with on_device_of(parts):
                kernels.sum_parts[(count,)](parts, order, offsets, gradient, D=c)
