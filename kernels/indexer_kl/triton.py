"""The indexer's loss by Triton kernels, with its gradients, for one block of queries at a time.

The mass of a block's queries is computed first. Then a program per query reads the keys twice: for the sums that the
divergence consists of, and for the gradient of its scores. The gradient of a key is a sum over queries. For chosen
entries, it uses atomic additions, whose order varies. Otherwise the gradients of a block's scores are stored, and a
program per tile of keys adds its queries in a fixed order; so does
:func:`kernels.sparse_attention.deterministic_gradients` for chosen entries, after their gradients are scattered to all
entries. Operands are rounded to BF16, which holds all values of the formats of index keys up to 16 bits.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.autocast import in_float32, product_dtype
from kernels.entry_ranges import EntryRanges
from kernels.indexer_kl.precomputed import mean, wants_gradients
from kernels.indexer_kl.reference import MIN_MASS
from kernels.sparse_attention.mass import EntryMass
from kernels.sparse_attention.triton import adds_in_fixed_order
from kernels.triton_support.platform import (
    ARCHITECTURES,
    check_selection,
    is_interpreting,
    multiprocessors,
    require_device,
    require_shapes,
)
from kernels.triton_support.tiles import Tile, Tiles, launch_best, padded_dim

MAX_DIMS, MAX_HEADS = 128, 64
_MAX_SCORES = 1 << 25
"""Maximum number of scores per block of several queries."""
_PROGRAMS_PER_MULTIPROCESSOR = 4
_MIN_QUERIES_PER_SPLIT = 64
"""Minimum number of queries per split of the keys' gradients."""

TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"BLOCK_N": 16}),),
    "sm_80": (Tile(4, 2, {"BLOCK_N": 32}),),
    "sm_90": (Tile(4, 2, {"BLOCK_N": 64}), Tile(8, 2, {"BLOCK_N": 128})),
    "sm_100": (Tile(4, 2, {"BLOCK_N": 64}),),
    "gfx942": (Tile(4, 1, {"BLOCK_N": 64}),),
}
KEY_TILES: Tiles = {
    "interpreter": (Tile(4, 1, {"BLOCK_N": 16}),),
    "sm_80": (Tile(4, 2, {"BLOCK_N": 64}),),
    "sm_90": (Tile(4, 3, {"BLOCK_N": 64}), Tile(8, 3, {"BLOCK_N": 128})),
    "sm_100": (Tile(4, 3, {"BLOCK_N": 64}),),
    "gfx942": (Tile(4, 1, {"BLOCK_N": 64}),),
}
assert set(TILES) == set(KEY_TILES) == {"interpreter", *ARCHITECTURES}


def supports(query: Tensor) -> bool:
    """Return whether the backend runs by default for these index queries on a GPU: with 16-bit products."""
    return product_dtype(query) in (torch.bfloat16, torch.float16) and not _fault(query)


def _fault(query: Tensor) -> str:
    """Return why queries are not supported, or an empty string."""
    for what, found, most in (("dims", query.shape[3], MAX_DIMS), ("heads", query.shape[2], MAX_HEADS)):
        if found > most:
            return f"{what} up to {most}; found {found}"
    return ""


def indexer_kl(
    query: Tensor,
    keys: Tensor,
    head_weights: Tensor,
    mass: EntryMass,
    visible: EntryRanges,
    chosen: Tensor | None = None,
) -> Tensor:
    """Implement :func:`kernels.indexer_kl.indexer_kl`. Raises ValueError for unsupported inputs."""
    require_device("indexer_kl", query)
    if fault := _fault(query):
        raise ValueError(f"indexer_kl: the triton backend supports {fault}")
    inputs = query, keys, head_weights
    (B, S, h, c), T = query.shape, keys.shape[1]
    require_shapes(
        "indexer_kl",
        keys=(keys, (B, T, c)),
        head_weights=(head_weights, (B, S, h)),
        first=(visible.first, ((B, 1), S)),
        end=(visible.end, ((B, 1), S)),
        chosen=(chosen, (B, S, 0 if chosen is None else chosen.shape[-1])),
    )
    if chosen is not None:
        check_selection("indexer_kl", chosen, keys.shape[1])
    with in_float32(query):
        total, gradients = _sum(*inputs, mass, visible, chosen, wants_gradients(*inputs))
        return mean(total, inputs, gradients, visible, chosen)


@torch.no_grad()
def _sum(
    query: Tensor,
    keys: Tensor,
    head_weights: Tensor,
    mass: EntryMass,
    visible: EntryRanges,
    chosen: Tensor | None,
    has_gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the sum over queries, and its gradients if wanted."""
    (B, S), T = query.shape[:2], keys.shape[1]
    total = torch.zeros((), dtype=torch.float32, device=query.device)
    inputs = query, keys, head_weights
    gradients = [torch.zeros_like(x, dtype=torch.float32) for x in inputs] if has_gradients else []
    width = T if chosen is None else chosen.shape[2]
    if not width:
        return total, gradients
    dtype = torch.float32 if is_interpreting() else torch.bfloat16
    q, k = (x.to(dtype).contiguous() for x in (query, keys))
    block = _Block(q, k, head_weights.float().contiguous(), visible, chosen, width)
    adds = has_gradients and chosen is not None and not adds_in_fixed_order()
    stores = has_gradients and not adds
    step = max(1, _MAX_SCORES // (B * (T if stores else width)))
    for begin in range(0, S, step):
        queries = slice(begin, min(S, begin + step))
        value, gradient, grad_query, grad_keys, grad_weights = block.divergence(mass, queries, stores, adds)
        total += value.sum()
        if has_gradients:
            gradients[0][:, queries], gradients[2][:, queries] = grad_query, grad_weights
            gradients[1] += block.key_gradients(gradient, queries) if stores else grad_keys
    return total, gradients


@dataclass(frozen=True)
class _Block:
    """The inputs of launches for one block of queries."""

    query: Tensor
    keys: Tensor
    head_weights: Tensor
    visible: EntryRanges
    chosen: Tensor | None
    width: int

    @property
    def constants(self) -> dict[str, int]:
        h, c = self.query.shape[2:]
        return {"C": c, "DIMS": padded_dim(c), "HEADS": padded_dim(h), "UPCAST": is_interpreting()}

    def divergence(self, mass: EntryMass, queries: slice, stores: bool, adds: bool) -> tuple[Tensor, ...]:
        """Return the divergence of every query [B, n], the gradients of scores [B, n, T or K] (``stores``), of queries
        [B, n, h, c], of keys [B, T, c] (``adds``), and of head weights [B, n, h] (``stores`` or ``adds``)."""
        kernels = importlib.import_module("kernels.indexer_kl.triton_kernels")
        q, (B, S, h, c), T, n = self.query, self.query.shape, self.keys.shape[1], queries.stop - queries.start
        teacher = mass.of(queries).contiguous()
        require_shapes("indexer_kl", mass=(teacher, (B, n, self.width)))
        first, end = (x.to(torch.int32).contiguous() for x in self.visible)
        chosen = first if self.chosen is None else self.chosen.to(torch.int32).contiguous()
        has_gradients = stores or adds

        def run(tile: Tile) -> tuple[Tensor, ...]:
            value = teacher.new_empty(B, n)
            gradient = torch.zeros_like(teacher) if stores else teacher
            of_query, of_weights = (teacher.new_empty(B, n, h, *d) if has_gradients else teacher for d in ([c], []))
            of_keys = teacher.new_zeros(B, T, c) if adds else teacher
            kernels.divergence[(n, B)](
                q, self.keys, self.head_weights, teacher, chosen, first, end, value, gradient, of_query, of_keys,
                of_weights, queries.start, n, S, T, self.width, h, S if len(end) > 1 else 0,
                HAS_CHOSEN=self.chosen is not None, STORE=stores, ADD=adds, MIN_MASS=MIN_MASS,
                **self.constants, **tile.options,
            )  # fmt: skip
            return value, gradient, of_query, of_keys, of_weights

        shape = (B * n, self.width, h, c, stores, adds)
        return launch_best("indexer_kl.divergence", TILES, shape, q.device, run)

    def key_gradients(self, gradient: Tensor, queries: slice) -> Tensor:
        """Return the gradient of the keys [B, T, c] for that of the scores of some queries."""
        kernels = importlib.import_module("kernels.indexer_kl.triton_kernels")
        q, (B, S, h, c), T, n = self.query, self.query.shape, self.keys.shape[1], queries.stop - queries.start
        if self.chosen is not None:
            places = self.chosen[:, queries].clamp(min=0).long()  # the gradient of an unused slot is 0
            gradient = gradient.new_zeros(B, n, T).scatter_add_(-1, places, gradient)

        def run(tile: Tile) -> Tensor:
            tiles = -(-T // tile.sizes["BLOCK_N"])
            starts, stops = self._bounds(queries, tile.sizes["BLOCK_N"])
            wanted = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(q.device) // (tiles * B)
            splits = max(1, min(wanted, n // _MIN_QUERIES_PER_SPLIT))
            parts = gradient.new_empty(splits, B, T, c)
            kernels.key_gradients[(tiles, splits, B)](
                q, self.keys, self.head_weights, gradient, starts, stops, parts,
                queries.start, n, S, T, h, tiles if len(starts) > 1 else 0, **self.constants, **tile.options,
            )  # fmt: skip
            return parts

        parts = launch_best("indexer_kl.key_gradients", KEY_TILES, (B, n, T, h, c), q.device, run)
        return parts.sum(0)

    def _bounds(self, queries: slice, size: int) -> tuple[Tensor, Tensor]:
        """Return the first query that sees each tile of ``size`` keys and the end of those: int32 [B or 1, tiles]."""
        tiles = torch.arange(0, self.keys.shape[1], size, device=self.keys.device)
        if self.chosen is not None:
            starts, stops = torch.zeros_like(tiles), torch.full_like(tiles, queries.stop - queries.start)
            return starts.int().unsqueeze(0), stops.int().unsqueeze(0)
        first, end = (x.contiguous() for x in self.visible.of(queries))
        tiles = tiles.expand(len(end), -1).contiguous()
        return torch.searchsorted(end, tiles, right=True).int(), torch.searchsorted(first, tiles + size).int()
