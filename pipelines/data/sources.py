"""Source documents: text files, JSON Lines records and Parquet rows, read in chunks.

Memory holds one chunk of text and at most one JSON record or Parquet batch, however large the input.
"""

from __future__ import annotations

import codecs
import functools
import io
import itertools
import json
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import DataError
from model.wording import json_type, quote
from pipelines.data.source_files import SourceFile

CHUNK_CHARACTERS = 1 << 20
_LINE_BYTES = 1 << 16
"""Bytes at the start of a line in which a Python file may declare its encoding."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks and their encodings. UTF-32 LE comes before UTF-16 LE, because its mark begins with the other."""


@dataclass(frozen=True)
class SourceDocument:
    source: str
    """File name, with the line or row number of a record."""
    open: Callable[[], Iterator[str]]
    """Read the text in chunks of about CHUNK_CHARACTERS. Called several times: to choose the split and to tokenize."""


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
            raise DataError(f"data.sources: {file.name}: cannot be read ({error.strerror or error})") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not valid {error.encoding}: {error.reason}"
    return str(error)


def _file_chunks(file: SourceFile) -> Iterator[str]:
    try:
        with file.path.open(encoding=_find_encoding(file), newline="") as text:
            for chunk in _chunks(text):
                chunk.encode()  # a Python file may declare an encoding with lone surrogates
                if "\0" in chunk:
                    raise DataError(f"data.sources: {file.name}: is not text (it holds NUL characters)")
                yield chunk
    except (UnicodeError, SyntaxError) as error:
        raise DataError(f"data.sources: {file.name}: is not text ({_reason(error)})") from error
    except LookupError as error:  # the codec does not decode bytes to text
        raise DataError(f"data.sources: {file.name}: declares an encoding that is not for text ({error})") from error
    except OSError as error:
        raise DataError(f"data.sources: {file.name}: cannot be read ({error.strerror})") from error


def _find_encoding(file: SourceFile) -> str:
    """Return the encoding of a byte order mark, or the one that a Python file declares; UTF-8 without either."""
    with file.path.open("rb") as source:
        start = source.read(4)
        marked = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), None)
        if marked is not None or file.path.suffix.lower() != ".py":
            return marked or "utf-8"
        source.seek(0)
        encoding, _ = tokenize.detect_encoding(lambda: _read_line(source))
        return encoding


def _read_line(source: BinaryIO) -> bytes:
    line = source.readline(_LINE_BYTES)
    return line if len(line) < _LINE_BYTES else line.decode(errors="ignore").encode()  # cut within a character


def _chunks(text: io.TextIOBase) -> Iterator[str]:
    """Yield chunks that end with a line where possible: a tokenizer's merges seldom cross lines."""
    while chunk := text.read(CHUNK_CHARACTERS):
        yield chunk + text.readline(CHUNK_CHARACTERS)


def _jsonl_documents(file: SourceFile, field: str) -> Iterator[SourceDocument]:
    for number, line in enumerate(_lines(file), start=1):
        if line.isspace():
            continue
        source = f"{file.name}:{number}"
        try:
            text = line.decode("utf-8-sig", "surrogatepass") if isinstance(line, bytes) else line
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            has_zeros = isinstance(line, bytes) and b"\0" in line[:4]
            hint = "; UTF-16 and UTF-32 need a byte order mark" if has_zeros else ""
            raise DataError(f"data.sources: {source}: not a JSON record ({error}){hint}") from error
        if not isinstance(record, dict):
            raise DataError(f"data.sources: {source}: expected a JSON object, found {json_type(record)}")
        if field not in record:
            raise DataError(
                f"data.sources: {source}: has no field {quote(field)} (data.text_field), only {_quote(record)}"
            )
        yield _text_document(source, record[field])


def _lines(file: SourceFile) -> Iterator[str | bytes]:
    """Yield the lines of a JSON Lines file: undecoded in UTF-8, so that a fault can be blamed on its line, as text in
    the encoding of another byte order mark."""
    encoding = _find_encoding(file)
    if encoding.startswith("utf-8"):
        with file.path.open("rb") as lines:
            yield from lines
        return
    try:
        with file.path.open(encoding=encoding, newline="\n") as text:
            yield from text
    except UnicodeError as error:
        raise DataError(f"data.sources: {file.name}: is not text ({_reason(error)})") from error


def _parquet_documents(file: SourceFile, column: str) -> Iterator[SourceDocument]:
    name = quote(column)
    try:
        with pq.ParquetFile(file.path, pre_buffer=False) as source:
            schema = source.schema_arrow
            if column not in schema.names:
                raise DataError(
                    f"data.sources: {file.name}: has no column {name} (data.text_field), only {_quote(schema.names)}"
                )
            if schema.names.count(column) > 1:
                raise DataError(
                    f"data.sources: {file.name}: has {schema.names.count(column)} columns {name} (data.text_field)"
                )
            dtype = schema.field(column).type
            if pa.types.is_dictionary(dtype):
                dtype = dtype.value_type
            if not (pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)):
                raise DataError(f"data.sources: {file.name}: column {name} holds {dtype}, not text")
            number = 0
            for batch in source.iter_batches(batch_size=64, columns=[column], use_threads=False):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield _text_document(f"{file.name}:{number}", text)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"data.sources: {file.name}: not a readable Parquet file ({' '.join(str(error).split())})"
        ) from error


def _text_document(source: str, text: object) -> SourceDocument:
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise DataError(f"data.sources: {source}: the text is {json_type(text)}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"data.sources: {source}: not valid Unicode text ({error.reason})") from error
    return SourceDocument(source, lambda: _chunks(io.StringIO(text, newline="")))


def _quote(names: Iterable[str]) -> str:
    """Return the first names, shortened, for an error message."""
    shown = [repr(name[:40]) for name in itertools.islice(names, 9)]
    return ", ".join([*shown[:8], *(["..."] if len(shown) > 8 else [])]) or "nothing"
