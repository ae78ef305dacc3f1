"""Tensors spread over several safetensors files, as the ranks of a sharded training write them.

Part k of n of ``model.safetensors`` is ``model-0000k-of-0000n.safetensors``. Its header says which rows of a tensor it
holds, where it does not hold all of them, and which writing it belongs to. Ranks need not wait for one another: of
parts that a killed run left behind, one is missing, cut short or of another writing, and none of these is read.
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
from model.errors import CheckpointError

SpanOf = Callable[[str], RowRange | None]
"""The rows of a named tensor that are meant; None for all of them."""


@dataclass(frozen=True)
class Parts:
    """The files that make a whole."""

    count: int
    writing: str
    """What they have in common, and no other files that were ever written in their place."""

    def file(self, path: Path, number: int) -> Path:
        """Part ``number`` of ``path``, counted from 0."""
        return path.with_name(f"{path.stem}-{number + 1:05d}-of-{self.count:05d}{path.suffix}")

    def files(self, path: Path) -> list[Path]:
        return [self.file(path, number) for number in range(self.count)]


@dataclass(frozen=True)
class Part:
    """What one rank writes: its rows of what is sharded. What all of them hold whole, the first one writes."""

    number: int
    parts: Parts

    def write(self, path: Path, tensors: Mapping[str, Tensor], span_of: SpanOf) -> None:
        """Write this part of ``path``. ``tensors`` are the rank's own, contiguous and on the CPU."""
        spans = {name: span for name, tensor in tensors.items() if tensor.dim() and (span := span_of(name))}
        mine = {name: tensor for name, tensor in tensors.items() if (name in spans or self.number == 0)}
        rows = {name: list(span) for name, span in spans.items()}
        header = {"format": "pt", "writing": self.parts.writing, "rows": json.dumps(rows)}
        save_file(mine, self.parts.file(path, self.number), metadata=header)


def read(path: Path, parts: Parts | None = None, span_of: SpanOf = lambda name: None) -> dict[str, Tensor]:
    """The tensors of the file ``path``, or of its ``parts``; of those with a span these rows only.

    Raises CheckpointError when a file is missing, damaged or of another writing, and when rows are missing.
    """
    files = [path] if parts is None else parts.files(path)
    pieces: dict[str, list[tuple[RowRange | None, Any]]] = {}
    with ExitStack() as stack:
        for file in files:
            for name, span, stored in _opened(file, parts, stack):
                pieces.setdefault(name, []).append((span, stored))
        try:
            return {name: _joined(path, name, found, span_of(name)) for name, found in pieces.items()}
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{path}: damaged ({error})") from error


def _opened(file: Path, parts: Parts | None, stack: ExitStack) -> Iterator[tuple[str, RowRange | None, Any]]:
    """The names in a file, the rows of each (None: all) and what gives its data."""
    try:
        file.open("rb").close()  # the library calls a file missing that may not be read
        opened = stack.enter_context(safe_open(file, framework="pt"))
    except (FileNotFoundError, PermissionError) as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or not a safetensors file ({error})") from error
    rows: dict[str, RowRange] = {}
    if parts is not None:
        header = opened.metadata() or {}
        if header.get("writing") != parts.writing:
            raise CheckpointError(f"{file}: was not written together with the other files of this folder")
        try:
            rows = {name: RowRange(*map(int, span)) for name, span in json.loads(header["rows"]).items()}
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: says not which rows of its tensors it holds ({error})") from error
    for name in opened.keys():  # noqa: SIM118 (not a mapping)
        yield name, rows.get(name), opened.get_slice(name)


def _joined(path: Path, name: str, pieces: list[tuple[RowRange | None, Any]], wanted: RowRange | None) -> Tensor:
    """Rows of a tensor, from the pieces that hold some of them."""
    shape = pieces[0][1].get_shape()
    if not shape:
        return pieces[0][1][...]
    held = sorted((span or RowRange(0, shape[0], shape[0]), place) for place, (span, _) in enumerate(pieces))
    rows = held[0][0].rows
    ends = [0, *(span.end for span, _ in held)]
    if any(span.begin != end for (span, _), end in zip(held, ends)) or ends[-1] != rows:
        raise CheckpointError(f"{path}: tensor '{name}': some of its {rows} rows are in no part, or in two")
    begin, end, expected = wanted or RowRange(0, rows, rows)
    if expected != rows:
        raise CheckpointError(f"{path}: tensor '{name}' has {rows} rows, expected {expected}")
    found = [pieces[0][1][:0]]
    for span, place in held:
        first, last = max(begin, span.begin), min(end, span.end)
        if first < last:
            found.append(pieces[place][1][first - span.begin : last - span.begin])
    return found[1] if len(found) == 2 else torch.cat(found)
