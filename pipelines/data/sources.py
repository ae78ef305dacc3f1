"""Source documents: text files, JSON Lines records and Parquet rows, read in chunks.

Memory holds one chunk of text and at most one JSON record or Parquet batch, however large the input.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import json
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import DataError

CHUNK_CHARACTERS = 1 << 20
TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
"""Folders outside the library itself. Only some distributions ship its tests."""


@dataclass(frozen=True)
class SourceFile:
    name: str
    path: Path
    bytes: int


@dataclass(frozen=True)
class SourceDocument:
    source: str
    """File name, with the line or row number of a record."""
    open: Callable[[], Iterator[str]]
    """Read the text in chunks of about CHUNK_CHARACTERS. Called twice: to choose the split and to tokenize."""


def find_files(patterns: tuple[str, ...], seed: int) -> list[SourceFile]:
    """Return all source files, each once, ordered by a hash of their name and ``seed``.

    In alphabetical order, the first shards and anything cut off by ``max_text_bytes`` would cover one part of the
    corpus only. Raises DataError for a pattern without files, an unsupported suffix or an unreadable file.
    """
    paths = {name: Path(name) for pattern in patterns for name in _expand(pattern)} if patterns else _find_stdlib()
    files = []
    for name, path in paths.items():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{name}: unsupported suffix '{path.suffix}'; sources are {', '.join(SUFFIXES)} files")
        try:
            files.append(SourceFile(name, path, path.stat().st_size))
        except OSError as error:
            raise DataError(f"{name}: cannot be read ({error.strerror})") from error
    return sorted(files, key=lambda file: hashlib.sha256(f"{seed}\0{file.name}".encode()).digest())


def _find_stdlib() -> dict[str, Path]:
    root = Path(sysconfig.get_path("stdlib"))
    relative_paths = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    found = {
        f"stdlib/{path.as_posix()}": root / path for path in relative_paths if STDLIB_SKIPPED.isdisjoint(path.parts)
    }
    if not found:
        raise DataError(f"{root}: has no source files of the standard library; set data.sources")
    return found


def _expand(pattern: str) -> list[str]:
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    files = [name for name in found if not os.path.isdir(name)]
    if not files:
        hint = f"; for the files of a folder write {pattern.rstrip('/')}/**/*.txt or the like" if found else ""
        raise DataError(f"data.sources: '{pattern}' matches no file{hint}")
    return files


def read_documents(files: list[SourceFile], text_field: str) -> Iterator[SourceDocument]:
    """Yield the documents of all files. Raises DataError naming the file, and the record in it."""
    for file in files:
        suffix = file.path.suffix.lower()
        try:
            if suffix == ".jsonl":
                yield from _jsonl_documents(file, text_field)
            elif suffix == ".parquet":
                yield from _parquet_documents(file, text_field)
            else:
                yield SourceDocument(file.name, functools.partial(_file_chunks, file))
        except OSError as error:  # pyarrow's own have no strerror
            raise DataError(f"{file.name}: cannot be read ({error.strerror or error})") from error


def _file_chunks(file: SourceFile) -> Iterator[str]:
    try:
        encoding = "utf-8-sig"
        if file.path.suffix.lower() == ".py":
            with file.path.open("rb") as source:
                encoding, _ = tokenize.detect_encoding(source.readline)
        with file.path.open(encoding=encoding, newline="") as text:
            yield from _chunks(text)
    except (UnicodeError, SyntaxError) as error:
        raise DataError(f"{file.name}: is not text ({error})") from error
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read ({error.strerror})") from error


def _chunks(text: io.TextIOBase) -> Iterator[str]:
    """Yield chunks that end with a line where possible: a tokenizer's merges seldom cross lines."""
    while chunk := text.read(CHUNK_CHARACTERS):
        yield chunk + text.readline(CHUNK_CHARACTERS)


def _jsonl_documents(file: SourceFile, field: str) -> Iterator[SourceDocument]:
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            source = f"{file.name}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{source}: not a JSON record ({error})") from error
            if not isinstance(record, dict):
                raise DataError(f"{source}: expected a JSON object, found {type(record).__name__}")
            if field not in record:
                raise DataError(f"{source}: has no field '{field}' (data.text_field), only {_quote(record)}")
            yield _text_document(source, record[field])


def _parquet_documents(file: SourceFile, column: str) -> Iterator[SourceDocument]:
    try:
        with pq.ParquetFile(file.path, pre_buffer=False) as source:
            schema = source.schema_arrow
            if column not in schema.names:
                raise DataError(f"{file.name}: has no column '{column}' (data.text_field), only {_quote(schema.names)}")
            dtype = schema.field(column).type
            if pa.types.is_dictionary(dtype):
                dtype = dtype.value_type
            if not (pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)):
                raise DataError(f"{file.name}: column '{column}' holds {dtype}, not text")
            number = 0
            for batch in source.iter_batches(batch_size=64, columns=[column], use_threads=False):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield _text_document(f"{file.name}:{number}", text)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file.name}: not a readable Parquet file ({' '.join(str(error).split())})") from error


def _text_document(source: str, text: object) -> SourceDocument:
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise DataError(f"{source}: the text is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: not valid Unicode text ({error.reason})") from error
    return SourceDocument(source, lambda: _chunks(io.StringIO(text, newline="")))


def _quote(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"
