"""Fill caches with random entries, to measure memory and speed at long lengths without a prefill."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cache_io import EntryLayout, pack
from model.cache import Cache
from model.cache.entries import PagedEntries
from model.cache.recurrent_state import RecurrentState
from model.cache.ring import WindowCache
from model.errors import CacheError

_PIECE_BYTES = 1 << 26
_ROWS_AT_ONCE = 1024
SPARE_BYTES = 5 * _PIECE_BYTES
"""Maximum memory of filling beyond the cache: pieces for three layouts, rows being copied and their order."""


def fill_random(cache: Cache, tokens: int, seed: int = 0) -> None:
    """Fill every sequence of an empty cache with random entries for ``tokens`` tokens. Decoding can continue after it.

    Rows are packed from standard normal values; compressor states are normal values. For each layout at most 64 MiB of
    rows are packed. Every growing part of every sequence copies them in another random order, repeatedly if it needs
    more. At 1,048,576 tokens of V4-Flash, index keys are distinct within a layer and a main entry occurs two or three
    times. Memory beyond the cache is bounded by :data:`SPARE_BYTES`.

    Raises CacheError and changes nothing if the cache is not empty or the tokens do not fit.
    """
    if tokens < 1 or any(cache.lengths):
        raise CacheError(
            f"only an empty cache can be filled, with at least 1 token: the cache holds {cache.lengths}, "
            f"asked for {tokens}"
        )
    cache.begin(cache.batch_size, tokens)
    generator = torch.Generator(cache.device).manual_seed(seed)
    pages = cache.pool.pages_for(tokens)
    needed: dict[EntryLayout, int] = {}
    for declared in cache.pool.parts.values():
        rows = pages * cache.pool.page_tokens // declared.ratio
        needed[declared.layout] = max(rows, needed.get(declared.layout, 0))
    pieces = {
        layout: _packed_normals(min(rows, _PIECE_BYTES // layout.nbytes), layout, generator)
        for layout, rows in needed.items()
    }
    for layer in cache.layers:
        for part in layer.parts.values():
            if isinstance(part, PagedEntries):
                _fill_pages(part, pages, pieces[part.layout], generator)
            elif isinstance(part, WindowCache):
                packed = _packed_normals(part.data[..., 0].numel(), part.part.layout, generator)
                part.data.copy_(packed.view_as(part.data))
            elif isinstance(part, RecurrentState):
                shape = (cache.batch_size, *part.part.shape)
                part.append(torch.randn(shape, generator=generator, device=cache.device).to(part.part.dtype))
            else:
                part.data.normal_(generator=generator)
    cache.advance()


def _packed_normals(rows: int, layout: EntryLayout, generator: torch.Generator) -> Tensor:
    """Return packed normal values, uint8 [rows, layout.nbytes]. Packs a few rows at a time to limit memory."""
    packed = torch.empty(rows, layout.nbytes, dtype=torch.uint8, device=generator.device)
    for some in packed.split(_ROWS_AT_ONCE):
        x = torch.randn(len(some), layout.size, generator=generator, device=generator.device)
        some.copy_(pack(x, layout))
    return packed


def _fill_pages(part: PagedEntries, pages: int, piece: Tensor, generator: torch.Generator) -> None:
    """Fill the first ``pages`` pages of every sequence with rows of ``piece`` [rows, nbytes]."""
    pool = part.table.pool
    store = pool.rows(part.layer, part.name).view(pool.pages, -1)
    at_once = max(1, len(piece) // part.per_page)
    for held in part.table.pages:
        order = torch.randperm(len(piece), generator=generator, device=pool.device)
        start = 0
        for some in torch.tensor(held[:pages], device=pool.device).split(at_once):
            count = len(some) * part.per_page
            picked = order[torch.arange(start, start + count, device=pool.device) % len(order)]
            store.index_copy_(0, some, piece.index_select(0, picked).view(len(some), -1))
            start += count
