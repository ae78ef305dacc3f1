"""Safetensors files written by the ranks of a sharded training, one file per rank.

Rank k of n writes its rows of ``model.safetensors`` to ``model-rank-0000k-of-0000n.safetensors``, counted from 1. The
header holds the row ranges of sharded tensors and the ID of the save. Ranks do not wait for one another: if a run is
killed during a save, a file is missing, truncated or has another save's ID, and reading raises CheckpointError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.distributed.dtensor import RowRange
from model.errors import MALFORMED, CheckpointError
from model.regular_files import check_regular

RowLookup = Callable[[str], RowRange | None]
"""Maps a tensor's name to a row range; None stands for all rows."""


@dataclass(frozen=True)
class ShardSet:
    """The files of one save, one per rank."""

    count: int
    save_id: str
    """Random ID shared by all files of one save."""
    legacy: bool = False
    """True if the files have the names and header of earlier releases, ``model-00001-of-00008.safetensors``. They are
    still read, but no longer written: Hugging Face uses these names for files of whole tensors."""

    def file(self, path: Path, rank: int) -> Path:
        """Return the file of ``rank``, counted from 0, for the tensors of ``path``."""
        kind = "" if self.legacy else "rank-"
        return path.with_name(f"{path.stem}-{kind}{rank + 1:05d}-of-{self.count:05d}{path.suffix}")

    def files(self, path: Path) -> Iterator[Path]:
        """Yield the file of each rank. Raises CheckpointError at the first one that is missing: the count comes from a
        file and may be absurd."""
        for rank in range(self.count):
            file = self.file(path, rank)
            if not file.exists():
                raise CheckpointError(f"{file}: No such file or directory")
            yield file

    @property
    def id_key(self) -> str:
        """Header key of the save ID."""
        return "writing" if self.legacy else "save_id"


@dataclass(frozen=True)
class RankShard:
    """The tensors that one rank writes: its rows of sharded tensors and, on rank 0, all replicated tensors."""

    rank: int
    shards: ShardSet

    def write(self, path: Path, tensors: Mapping[str, Tensor], find_rows: RowLookup) -> None:
        """Write this rank's file for ``path``. ``tensors`` are the rank's local tensors, contiguous and on the CPU."""
        ranges = {name: rows for name, tensor in tensors.items() if tensor.dim() and (rows := find_rows(name))}
        written = {name: tensor for name, tensor in tensors.items() if name in ranges or self.rank == 0}
        encoded = json.dumps({name: list(rows) for name, rows in ranges.items()})
        header = {"format": "pt", self.shards.id_key: self.shards.save_id, "rows": encoded}
        save_file(written, self.shards.file(path, self.rank), metadata=header)


def read_shapes(path: Path, shards: ShardSet | None = None) -> dict[str, list[int]]:
    """Return the shapes of the tensors of the file ``path``, or of its ``shards``, from the files' headers.

    Raises CheckpointError if a file is missing, damaged or from another save.
    """
    shapes: dict[str, list[int]] = {}
    with ExitStack() as stack:
        for file in [path] if shards is None else shards.files(path):
            for name, rows, piece in _open_pieces(file, shards, stack):
                shape = list(piece.get_shape())
                shapes[name] = [rows.rows, *shape[1:]] if rows is not None else shape
    return shapes


def read_shards(
    path: Path, shards: ShardSet | None = None, find_rows: RowLookup = lambda name: None
) -> dict[str, Tensor]:
    """Return the tensors of the file ``path``, or of its ``shards``. ``find_rows`` limits tensors to a row range.

    Raises CheckpointError if a file is missing, damaged or from another save, or if rows are missing.
    """
    files = [path] if shards is None else shards.files(path)
    pieces: dict[str, list[tuple[RowRange | None, Any]]] = {}
    with ExitStack() as stack:
        for file in files:
            for name, rows, piece in _open_pieces(file, shards, stack):
                pieces.setdefault(name, []).append((rows, piece))
        try:
            return {name: _concatenate(path, name, found, find_rows(name)) for name, found in pieces.items()}
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{path}: damaged ({error})") from error


def _open_pieces(file: Path, shards: ShardSet | None, stack: ExitStack) -> Iterator[tuple[str, RowRange | None, Any]]:
    """Yield the name, rows (None for all) and lazily loaded data of each tensor in a file."""
    try:
        check_regular(file)
        file.open("rb").close()  # safetensors reports an unreadable file as missing
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    try:
        opened = stack.enter_context(safe_open(file, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or not a safetensors file ({error})") from error
    ranges: dict[str, RowRange] = {}
    if shards is not None:
        header = opened.metadata() or {}
        if header.get(shards.id_key) != shards.save_id:
            raise CheckpointError(f"{file}: belongs to another save than the folder's config.json")
        try:
            ranges = {name: RowRange(*map(int, rows)) for name, rows in json.loads(header["rows"]).items()}
        except MALFORMED as error:
            raise CheckpointError(f"{file}: the row ranges of its tensors are missing or invalid ({error})") from error
    for name in opened.keys():  # noqa: SIM118 (not a mapping)
        yield name, ranges.get(name), opened.get_slice(name)


def _concatenate(path: Path, name: str, pieces: list[tuple[RowRange | None, Any]], wanted: RowRange | None) -> Tensor:
    """Return the ``wanted`` rows of a tensor, all by default, from pieces that hold some rows each."""
    shape = pieces[0][1].get_shape()
    if not shape:
        return pieces[0][1][...]
    held = sorted((rows or RowRange(0, shape[0], shape[0]), index) for index, (rows, _) in enumerate(pieces))
    total = held[0][0].rows
    ends = [0, *(rows.end for rows, _ in held)]
    if any(rows.begin != end for (rows, _), end in zip(held, ends)) or ends[-1] != total:
        raise CheckpointError(f"{path}: tensor '{name}': some of its {total} rows are missing or stored twice")
    begin, end, expected = wanted or RowRange(0, total, total)
    if expected != total:
        raise CheckpointError(f"{path}: tensor '{name}' has {total} rows, expected {expected}")
    found = [pieces[0][1][:0]]
    for rows, index in held:
        first, last = max(begin, rows.begin), min(end, rows.end)
        if first < last:
            found.append(pieces[index][1][first - rows.begin : last - rows.begin])
    return found[1] if len(found) == 2 else torch.cat(found)
