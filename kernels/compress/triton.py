"""Pooling by Triton kernels, forward and backward.

For short blocks, one program pools, normalizes, rotates and stores an entry, with all channels in registers. Only the
inputs are saved for the backward pass. The rows of a long block do not fit: programs pool chunks of channels, so that a
few entries use the whole GPU, and a second kernel finishes the entries. Their backward pass saves the pooled entries,
one row per block. In both cases, each pass reads the projections once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.autocast import detached
from kernels.cache_io import EntryLayout, Pages
from kernels.cache_io.triton import layout_constants
from kernels.compress.inputs import DocumentBlocks, Finish
from kernels.compress.reference import most_completed
from kernels.triton_support.platform import ARCHITECTURES, require_choice, require_device, require_shapes
from kernels.triton_support.tiles import Tile, Tiles, launch_best, power_of_two

MAX_FUSED = 4096
"""Maximum block size (tokens times channels, both padded) of the fused kernels."""

FUSED_TILES: Tiles = {
    "interpreter": (Tile(4, 1),),
    **{name: (Tile(4, 1), Tile(8, 1)) for name in ARCHITECTURES},
    "gfx942": (Tile(4, 1),),  # 8 warps are 512 threads: one value per thread for index keys, too few for vector loads
}
FUSED_BACKWARD_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"ENTRIES": 3}),),
    **{name: (Tile(8, 1, {"ENTRIES": 16}), Tile(8, 1, {"ENTRIES": 4})) for name in ARCHITECTURES},
}
CHUNK_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"elements": 64}),),
    **{name: (Tile(4, 1, {"elements": 4096}), Tile(4, 1, {"elements": 2048})) for name in ARCHITECTURES},
}
CHUNK_BACKWARD_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"elements": 64, "ENTRIES": 2}),),
    **{
        name: (Tile(4, 1, {"elements": 4096, "ENTRIES": 8}), Tile(4, 1, {"elements": 2048, "ENTRIES": 1}))
        for name in ARCHITECTURES
    },
}
FINISH_TILES: Tiles = {
    "interpreter": (Tile(4, 1),),
    **{name: (Tile(4, 1),) for name in ARCHITECTURES},
}
FINISH_BACKWARD_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"ENTRIES": 3}),),
    **{name: (Tile(4, 1, {"ENTRIES": 8}), Tile(4, 1, {"ENTRIES": 1})) for name in ARCHITECTURES},
}
WHOLE, DOCUMENTS, RING = 0, 1, 2  # as in the kernels


def is_fused(m: int, c: int) -> bool:
    """Return whether entries of m tokens and c channels are pooled and finished by one kernel."""
    return power_of_two(m) * power_of_two(c) <= MAX_FUSED


def block_constants(m: int, c: int, tile: Tile) -> dict[str, int]:
    """Return the block sizes of a program that pools all channels, or about ``elements`` values of a long block."""
    rows, width = power_of_two(m), power_of_two(c)
    if "elements" in tile.sizes:
        width = min(max(16, tile.sizes["elements"] // rows), width)
    constants = {"M_PAD": rows, "BLOCK_C": width}
    return {**constants, **{name: size for name, size in tile.sizes.items() if name == "ENTRIES"}}


def finish_constants(c: int, tile: Tile) -> dict[str, int]:
    """Return the block sizes of a program that finishes entries."""
    return {"BLOCK_C": power_of_two(c), **tile.sizes}


def row_layout_constants(layout: EntryLayout) -> dict[str, int]:
    """Return a layout as compile-time constants of kernels that have an entry in registers."""
    constants = layout_constants(layout)
    del constants["BODY_PAD"], constants["ROPE_PAD"]
    return {**constants, "BLOCK": power_of_two(constants["BLOCK"])}


def supports(rows: Tensor, finish: Finish) -> bool:
    """Return whether the backend supports these rows and entries on a GPU."""
    return rows.dtype == torch.float32 and len(finish.norm_weight) % 2 == 0


def compress(
    rows: Tensor,
    bias: Tensor,
    finish: Finish,
    overlap: bool,
    has_previous: bool = False,
    blocks: DocumentBlocks | None = None,
    layout: EntryLayout | None = None,
) -> Tensor:
    """Implement :func:`kernels.compress.compress`. Raises ValueError for dtypes other than float32 and odd widths."""
    places = starts = None
    skipped = int(has_previous and overlap)
    if blocks is None:
        if rows.shape[1] % len(bias):
            raise ValueError(f"compress: {rows.shape[1]} tokens are not a multiple of the {len(bias)} tokens per block")
        n = rows.shape[1] // len(bias) - skipped
    else:
        n = blocks.first.shape[1]
        require_shapes("compress", first=(blocks.first, (len(rows), n)), starts=(blocks.starts, (len(rows), n)))
        places, starts = blocks.first.contiguous(), blocks.starts.contiguous().view(torch.int8)
    _require(rows, bias, finish, overlap, layout, n)
    weight, norm_eps, cos, sin, hadamard = finish
    layout = EntryLayout(len(weight), "fp32") if layout is None else layout
    options = _Options(overlap, skipped, norm_eps, hadamard, layout)
    return _Compress.apply(rows, bias, weight, cos.contiguous(), sin.contiguous(), places, starts, n, options)


def compress_next(
    ring: Tensor,
    rows: Tensor,
    bias: Tensor,
    finish: Finish,
    lengths: Tensor,
    overlap: bool,
    layout: EntryLayout,
    pages: Pages,
) -> None:
    """Implement :func:`kernels.compress.compress_next`, with the restrictions of :func:`compress`. The kernels find the
    completed blocks themselves, so that a launch does not depend on lengths."""
    n = most_completed(rows.shape[1], len(bias))
    if not len(rows) * n:
        return
    _require(rows, bias, finish, overlap, layout, n)
    require_shapes("compress_next", **pages.shapes(len(rows), layout.nbytes))
    rows, bias, weight = (detached(x).contiguous() for x in (rows, bias, finish.norm_weight))
    places = lengths.expand(len(rows)).contiguous()
    options = _Options(overlap, 0, finish.norm_eps, finish.hadamard, layout)
    entries = _Entries(rows, bias, weight, finish.cos.contiguous(), finish.sin.contiguous(), places, None, options)
    entries.forward(n, ring, pages)


def _require(rows: Tensor, bias: Tensor, finish: Finish, overlap: bool, layout: EntryLayout | None, n: int) -> None:
    """Raise ValueError unless the kernels support these inputs for n entries."""
    require_device("compress", rows)
    require_choice("compress", "dtypes", rows.dtype, (torch.float32,))
    c = len(finish.norm_weight)
    if c % 2:
        raise ValueError(f"compress: the triton backend supports even numbers of channels; found {c}")
    if finish.hadamard and c & (c - 1):
        raise ValueError(f"compress: the Hadamard rotation requires a power of two of channels, found {c}")
    if layout is not None and layout.size != c:
        raise ValueError(f"compress: the layout has {layout.size} dims, the entries {c}")
    w = 2 * c if overlap else c
    require_shapes("compress", rows=(rows, (*rows.shape[:2], 2 * w)), bias=(bias, (len(bias), w)))
    cos, sin = list(finish.cos.shape), list(finish.sin.shape)
    if cos != sin or len(cos) != 3 or cos[0] not in (1, len(rows)) or cos[1] != n or 2 * cos[2] > c:
        expected = f"[1 or {len(rows)}, {n}, at most {c // 2}]"
        raise ValueError(f"compress: cos and sin must have the shape {expected}, found {cos} and {sin}")


@dataclass(frozen=True)
class _Options:
    """Arguments of the kernels other than tensors."""

    overlap: bool
    skipped: int
    """Number of leading blocks without an entry."""
    norm_eps: float
    hadamard: bool
    layout: EntryLayout


@dataclass(frozen=True)
class _Entries:
    """Kernel arguments, with methods that launch the forward and backward kernels."""

    rows: Tensor
    bias: Tensor
    weight: Tensor
    cos: Tensor
    sin: Tensor
    places: Tensor | None
    """int64: first tokens of the blocks of packed documents [B, n], or tokens before those of ``rows`` [B]."""
    starts: Tensor | None
    options: _Options

    @property
    def c(self) -> int:
        """Channels of an entry."""
        return len(self.weight)

    @property
    def is_fused(self) -> bool:
        """True if one kernel pools and finishes the entries."""
        return is_fused(len(self.bias), self.c)

    @property
    def _finish(self) -> dict[str, int]:
        """Compile-time constants of the steps after pooling."""
        return {"C": self.c, "R": self.cos.shape[-1], "HADAMARD": self.options.hadamard}

    def _launch(
        self, name: str, tiles: Tiles, source: int, n: int, run: Callable[[Any, Tile], Any], label: str = ""
    ) -> Any:
        """Launch the kernel ``name`` with the best of ``tiles``, which is stored under ``label`` if given."""
        options = self.options
        if source == RING and self.rows.shape[1] < len(self.bias):
            # No block may be complete, and the settings would be timed without any work.
            tiles = {architecture: choices[:1] for architecture, choices in tiles.items()}
        shape = len(self.rows), n, len(self.bias), self.c, options.overlap, source, options.layout.spec
        kernel = getattr(importlib.import_module("kernels.compress.triton_kernels"), name)
        return launch_best(f"compress.{label or name}", tiles, shape, self.rows.device, lambda tile: run(kernel, tile))

    def forward(self, n: int, ring: Tensor | None = None, pages: Pages | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the entries [B, n, c], and the pooled entries unless the kernels are fused. With ``ring`` and
        ``pages``, write packed entries to the pages instead."""
        (B, S), m, c, device, options = self.rows.shape[:2], len(self.bias), self.c, self.rows.device, self.options
        source = RING if pages is not None else WHOLE if self.places is None else DOCUMENTS
        places = self.rows if self.places is None else self.places
        angle_rows = n if len(self.cos) > 1 else 0
        table, page_rows, P = self.rows, 1, 0
        if pages is not None:
            table, page_rows, P = pages.page_table.contiguous(), pages.page_size, pages.page_table.shape[1]
        constants = {"M": m, "SOURCE": source, **self._finish, **row_layout_constants(options.layout)}

        def output() -> Tensor:
            return torch.empty(B, n, c, device=device) if pages is None else pages.storage

        def pool(kernel, tile: Tile) -> Tensor:
            out = output() if self.is_fused else torch.empty(B, n, c, device=device)
            blocks = block_constants(m, c, tile)
            kernel[(B * n, -(-c // blocks["BLOCK_C"]))](
                self.rows, self.rows if ring is None else ring, places,
                places if self.starts is None else self.starts, self.bias, self.weight, self.cos, self.sin, table, out,
                n, S, options.skipped, 1 if ring is None else ring.shape[1], angle_rows, P, page_rows, options.norm_eps,
                OVERLAP=options.overlap, FINISH=self.is_fused, **constants, **blocks,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            return out

        def finish(kernel, tile: Tile) -> Tensor:
            out = output()
            kernel[(B * n,)](
                pooled, places, self.weight, self.cos, self.sin, table, out,
                n, S, angle_rows, P, page_rows, options.norm_eps,
                **constants, **finish_constants(c, tile), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            return out

        if self.is_fused:
            return self._launch("forward", FUSED_TILES, source, n, pool), None
        pooled = self._launch("forward", CHUNK_TILES, source, n, pool, "forward (chunks)")
        return self._launch("finish", FINISH_TILES, source, n, finish), pooled

    def backward(self, grad: Tensor, pooled: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of the rows, biases and the norm's weight."""
        (B, S), (m, w), c, n, device = self.rows.shape[:2], self.bias.shape, self.c, grad.shape[1], self.rows.device
        options = self.options
        source = WHOLE if self.places is None else DOCUMENTS
        places = self.rows if self.places is None else self.places
        angle_rows, total = n if len(self.cos) > 1 else 0, B * n

        def finish(kernel, tile: Tile) -> tuple[Tensor, Tensor]:
            programs = -(-total // tile.sizes["ENTRIES"])
            out, parts = torch.empty_like(grad), torch.empty(programs, c, device=device)
            kernel[(programs,)](
                pooled, self.weight, self.cos, self.sin, grad, out, parts, n, total, angle_rows, options.norm_eps,
                **self._finish, **finish_constants(c, tile), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            return out, parts

        def pool(kernel, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
            programs, blocks = -(-total // tile.sizes["ENTRIES"]), block_constants(m, c, tile)
            # Every row of adjacent blocks is written. Documents may have tokens without a block.
            grad_rows = torch.empty_like(self.rows) if source == WHOLE else torch.zeros_like(self.rows)
            bias_parts = torch.empty(programs, m, w, device=device)
            weight_parts = torch.empty(programs, c, device=device) if self.is_fused else bias_parts
            kernel[(programs, -(-c // blocks["BLOCK_C"]))](
                self.rows, places, places if self.starts is None else self.starts, self.bias, self.weight, self.cos,
                self.sin, grad, grad_rows, bias_parts, weight_parts,
                n, S, options.skipped, total, angle_rows, options.norm_eps,
                M=m, OVERLAP=options.overlap, SOURCE=source, FINISH=self.is_fused, **self._finish, **blocks,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            return grad_rows, bias_parts, weight_parts

        if self.is_fused:
            grad_rows, bias, weight = self._launch("backward", FUSED_BACKWARD_TILES, source, n, pool)
            return grad_rows, bias.sum(0), weight.sum(0)
        grad, weight = self._launch("finish_backward", FINISH_BACKWARD_TILES, source, n, finish)
        grad_rows, bias, _ = self._launch("backward", CHUNK_BACKWARD_TILES, source, n, pool, "backward (chunks)")
        return grad_rows, bias.sum(0), weight.sum(0)


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, bias, weight, cos, sin, places, starts, n, options):
        tensors = rows.contiguous(), bias.contiguous(), weight.contiguous(), cos, sin, places, starts
        entries = _Entries(*tensors, options)
        out, pooled = rows.new_empty(len(rows), n, entries.c), None
        if out.numel():
            out, pooled = entries.forward(n)
        ctx.save_for_backward(*tensors, pooled)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, grad):
        rows, bias, weight, cos, sin, places, starts, pooled = ctx.saved_tensors
        if grad.numel():
            entries = _Entries(rows, bias, weight, cos, sin, places, starts, ctx.options)
            gradients = entries.backward(grad.contiguous(), pooled)
        else:
            gradients = torch.zeros_like(rows), torch.zeros_like(bias), torch.zeros_like(weight)
        return *gradients, *(None,) * (len(ctx.needs_input_grad) - len(gradients))
