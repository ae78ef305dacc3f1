"""Selection of entries by Triton kernels. Keys of whole sequences are packed to BF16 first.

Scores of a bounded number of queries are written to a workspace, from which the k-th best is found by its bytes,
without a sort of all scores: a score takes 2 * h * c operations and only 4 bytes. Products have BF16 operands and
float32 sums; operands are exact, because queries are rounded to the format of the keys. Every score is computed in an
order that does not depend on other queries or on the number of entries.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.autocast import product_dtype
from kernels.cache_io import EntryLayout, Pages
from kernels.cache_io.triton import layout_constants
from kernels.entry_ranges import EntryRanges
from kernels.triton_support.platform import (
    ARCHITECTURES,
    Shape,
    is_interpreting,
    on_device_of,
    require_choice,
    require_device,
    require_shapes,
)
from kernels.triton_support.tiles import Tile, Tiles, launch_best, padded_dim, power_of_two

FORMATS = ("bf16", "fp8", "fp8_128", "fp4")
"""Formats of keys whose values BF16 holds exactly."""
MAX_DIMS, MAX_HEADS, MAX_K = 256, 128, 4096
_MAX_WORKSPACE_SCORES = 1 << 26
_SEGMENT = 8192
"""Scores per program where there are too few queries to occupy a GPU."""
_MANY_ROWS = 256
MAX_TILE = 1024
"""Rows of workspaces are multiples of this, and so of all tiles of the selection."""

SCORE_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"QUERIES": 4, "BLOCK_N": 16}),),
    "sm_80": (Tile(4, 3, {"QUERIES": 64, "BLOCK_N": 128}),),
    "sm_90": (Tile(4, 3, {"QUERIES": 64, "BLOCK_N": 128}), Tile(8, 3, {"QUERIES": 64, "BLOCK_N": 256})),
    "sm_100": (Tile(4, 3, {"QUERIES": 64, "BLOCK_N": 128}), Tile(8, 3, {"QUERIES": 64, "BLOCK_N": 256})),
    "gfx942": (Tile(4, 1, {"QUERIES": 64, "BLOCK_N": 128}),),
}
SELECT_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"TILE": 64}),),
    **{name: (Tile(4, 1, {"TILE": 1024}),) for name in ARCHITECTURES},
}
ORDER_TILES: Tiles = {name: (Tile(4, 1),) for name in ARCHITECTURES}


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


def supports(query: Tensor, layout: EntryLayout, k: int) -> bool:
    """Return whether the backend supports these inputs on a GPU."""
    return not _fault(query, layout, k)


def supports_sequences(query: Tensor, k: int) -> bool:
    """Return whether :func:`select_entries` runs by default on a GPU: with 16-bit products."""
    return product_dtype(query) in (torch.bfloat16, torch.float16) and supports(query, _sequence_layout(query), k)


def _sequence_layout(query: Tensor) -> EntryLayout:
    return EntryLayout(query.shape[-1], "bf16")


def _fault(query: Tensor, layout: EntryLayout, k: int) -> str:
    """Return why inputs are not supported, or an empty string."""
    if layout.body_format not in FORMATS or layout.rope:
        return f"keys in one of {', '.join(FORMATS)}; found {layout}"
    for what, found, most in (("dims", layout.size, MAX_DIMS), ("heads", query.shape[2], MAX_HEADS), ("k", k, MAX_K)):
        if found > most:
            return f"{what} up to {most}; found {found}"
    return ""


def index_topk(
    query: Tensor,
    keys: Pages,
    layout: EntryLayout,
    head_weights: Tensor,
    visible: Tensor,
    k: int,
    dtype: torch.dtype = torch.float32,
    batch_invariant: bool = False,
) -> Tensor:
    """Implement :func:`kernels.index_topk.index_topk`. Scores are always batch-invariant. Raises ValueError for
    unsupported inputs."""
    B, S = query.shape[:2]
    tensors = {"visible": (visible, ((B, 1), S)), **keys.shapes(B, layout.nbytes)}
    _check("index_topk", query, layout, head_weights, k, dtype, tensors)
    capacity = keys.page_table.shape[1] * keys.page_size
    # The GPU alone knows the number of entries. Synchronizing for it pays for prompts, not for single tokens.
    n = capacity if S == 1 else min(capacity, int(visible.max()))
    return _best(query, keys, layout, head_weights, None, visible.contiguous(), n, k, dtype)


def select_entries(
    query: Tensor, keys: Tensor, head_weights: Tensor, visible: EntryRanges, k: int, dtype: torch.dtype
) -> Tensor:
    """Implement :func:`kernels.index_topk.select_entries`. Raises ValueError for unsupported inputs."""
    layout = _sequence_layout(query)
    (B, S), T = query.shape[:2], keys.shape[1]
    ranges = {"first": (visible.first, ((B, 1), S)), "end": (visible.end, ((B, 1), S))}
    tensors = {"keys": (keys, (B, T, layout.size)), **ranges}
    _check("select_entries", query, layout, head_weights, k, dtype, tensors)
    packed = keys.detach().to(torch.bfloat16).contiguous().view(torch.uint8).view(B * T, layout.nbytes)
    pages = Pages(packed, T, torch.arange(B, device=keys.device).unsqueeze(1))
    first, end = (x.contiguous() for x in visible)
    return _best(query, pages, layout, head_weights, first, end, T, k, dtype)


def _check(
    operation: str, query: Tensor, layout: EntryLayout, head_weights: Tensor, k: int, dtype: torch.dtype,
    tensors: Mapping[str, tuple[Tensor, Shape]],
) -> None:  # fmt: skip
    """Raise ValueError unless the kernels support these inputs and read beyond none of them or of ``tensors``."""
    require_device(operation, query)
    require_choice(operation, "dtypes of scores", dtype, (torch.float32, torch.bfloat16))
    if fault := _fault(query, layout, k):
        raise ValueError(f"{operation}: the triton backend supports {fault}")
    B, S, h, _ = query.shape
    require_shapes(
        operation,
        query=(query, (B, S, h, layout.size)),
        head_weights=(head_weights, (B, S, h)),
        **tensors,
    )


def _best(
    query: Tensor, keys: Pages, layout: EntryLayout, head_weights: Tensor, first: Tensor | None, end: Tensor, n: int,
    k: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the best of the entries from ``first`` (0 for None) to ``end``, int64 [B or 1, S], at most n."""
    B, S = query.shape[:2]
    chosen = torch.full((B, S, k), -1, dtype=torch.int64, device=query.device)
    if not n:
        return chosen
    step = max(1, min(S, _MAX_WORKSPACE_SCORES // (B * n)))
    q = query.detach().to(torch.float32 if is_interpreting() else torch.bfloat16).contiguous()
    weights = head_weights.detach().float().contiguous()
    for begin in range(0, S, step):
        count = min(step, S - begin)
        scores = _scores(q, weights, keys, layout, first, end, begin, count, n, dtype == torch.bfloat16)
        _select(scores, n, first, end, k, begin, chosen)
    return chosen


def _scores(
    query: Tensor, weights: Tensor, keys: Pages, layout: EntryLayout, first: Tensor | None, end: Tensor, begin: int,
    count: int, n: int, rounds: bool,
) -> Tensor:  # fmt: skip
    """Return the scores of ``count`` queries from ``begin``, float32 [B, count, n rounded up to whole tiles].

    They are undefined for invisible keys.
    """
    kernels = importlib.import_module("kernels.index_topk.triton_kernels")
    B, S, h, _ = query.shape
    constants = score_constants(layout, h)

    def run(tile: Tile) -> Tensor:
        scores = torch.empty(B, count, round_up(n, MAX_TILE), dtype=torch.float32, device=query.device)
        grid = (-(-n // tile.sizes["BLOCK_N"]), -(-count // tile.sizes["QUERIES"]), B)
        kernels.score[grid](
            query, weights, keys.storage, keys.page_table.contiguous(), end if first is None else first, end, scores,
            begin, count, S, h, keys.page_size, keys.page_table.shape[1], S if len(end) > 1 else 0, scores.shape[2],
            **constants, HAS_FIRST=first is not None, ROUND=rounds, UPCAST=is_interpreting(), **tile.options,
        )  # fmt: skip
        return scores

    shape = (B, power_of_two(count), power_of_two(n), h, layout.spec)
    return launch_best("index_topk.score", SCORE_TILES, shape, query.device, run)


def score_constants(layout: EntryLayout, heads: int) -> dict[str, int]:
    """Return the compile-time constants of the score kernel."""
    names = ("NBYTES", "BODY", "FORMAT", "BODY_PAD", "BLOCK", "SCALES", "SCALE_OFFSET")
    constants = layout_constants(layout)
    return {**{name: constants[name] for name in names}, "HEADS": padded_dim(heads)}


def _select(scores: Tensor, n: int, first: Tensor | None, end: Tensor, k: int, begin: int, chosen: Tensor) -> None:
    """Write the selection of the queries from ``begin`` into chosen [B, S, k]. Rows of scores begin with n scores."""
    kernels = importlib.import_module("kernels.index_topk.triton_kernels")
    (B, count), S = scores.shape[:2], chosen.shape[1]
    rows, width = B * count, power_of_two(k)

    def run(given: Tensor, indices: Tensor | None, size: int, segment: int) -> tuple[Tensor, Tensor, int]:
        """Select among the first ``size`` scores, float32 [rows, stride]. Returns whole tiles, and their used part."""

        def launch(tile: Tile) -> tuple[Tensor, Tensor, int]:
            own = round_up(segment, tile.sizes["TILE"])
            segments = -(-size // own)
            shape = rows, round_up(segments * width, MAX_TILE) if segments > 1 else width
            best = torch.empty(shape, dtype=torch.float32, device=scores.device)
            found = torch.empty(shape, dtype=torch.int32, device=scores.device)
            kernels.select[(rows, segments)](
                given, found if indices is None else indices, end if first is None else first, end, best, found,
                given.shape[-1], size, own, k, S if len(end) > 1 else 0, count, begin, shape[1],
                HAS_INDICES=indices is not None, HAS_FIRST=first is not None and indices is None, WIDTH=width,
                **tile.options,
            )  # fmt: skip
            return best, found, segments * width

        return launch_best("index_topk.select", SELECT_TILES, (size, k), scores.device, launch)

    segment = max(_SEGMENT, 2 * width) if rows < _MANY_ROWS else n
    best, found, used = run(scores, None, n, segment)
    if used > width:
        best, found, _ = run(best, found, used, used)
    with on_device_of(scores):
        kernels.order[(rows,)](best, found, chosen, S, begin, count, k, WIDTH=width)
