"""``prepare``: text files in, token shards out, with generated retrieval documents mixed in.

Documents are streamed: memory holds one shard, one piece of text and at most one JSON record or Parquet batch, however
large the input. What a document becomes depends on its text and the settings alone, so the same input gives the same
bytes. A document goes to train or validation by the hash of its text, whatever its name, order or neighbours; exact
duplicates are kept, and land in the same split.

Long documents are stored as pieces of :data:`PIECE_ROWS` training rows, so that shards are well mixed without a global
shuffle. Pieces are numbered and carry their document's id; each begins with BOS, only the last ends with EOS.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evals import retrieval
from model.errors import ConfigError, DataError
from model.tokenizer import FILE_NAME, ByteTokenizer, Tokenizer, load_tokenizer
from pipelines.data.packing import (
    FORMAT_VERSION,
    KINDS,
    MANIFEST_NAME,
    SHARD_SCHEMA,
    SPLITS,
    Kind,
    Manifest,
    Shard,
    Split,
    SplitManifest,
    count_rows,
    file_sha256,
    read_manifest,
)
from pipelines.recipe.schema import Recipe

PIECE_ROWS = 8
ROW_GROUP_TOKENS = 262_144
CHUNK_CHARACTERS = 1 << 20
TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
"""Not the library itself; some distributions ship its tests, some do not."""


@dataclass(frozen=True)
class PrepareResult:
    folder: Path
    manifest: Manifest
    reused: bool
    """The folder was already there, complete and prepared with the same settings."""


def run(recipe: Recipe) -> PrepareResult:
    """Write ``recipe.data_folder``, or reuse it when it was prepared with the same settings.

    Raises DataError or ConfigError; then nothing is left behind and nothing that existed was touched.
    """
    data, folder = recipe.data, recipe.data_folder
    tokenizer = load_tokenizer(data.tokenizer)
    files = _find_files(data.sources, data.seed)
    _Retrieval(recipe, tokenizer, "train").check()
    with _writing(folder) as temporary:
        tokenizer.save(temporary)
        settings = _settings(recipe, files, temporary / FILE_NAME)
        if folder.exists() and any(folder.iterdir()):
            result = PrepareResult(folder, _existing(folder, settings), reused=True)
        else:
            splits = _write_splits(recipe, tokenizer, files, temporary)
            manifest = Manifest(
                format=FORMAT_VERSION,
                settings=settings,
                tokenizer=data.tokenizer,
                vocab_size=tokenizer.vocab_size,
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
                sequence_length=data.sequence_length,
                packing=data.packing,
                splits=splits,
            )
            (temporary / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n")
            temporary.rename(folder)
            result = PrepareResult(folder, manifest, reused=False)
    _report(result)
    return result


@contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    """A temporary sibling of ``folder``, gone afterwards unless it was renamed."""
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had the same id
        temporary.mkdir(parents=True)
        yield temporary
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _settings(recipe: Recipe, files: list[_File], tokenizer_file: Path) -> dict[str, object]:
    """What the shards' content depends on, as plain JSON values; of the sources their names and sizes."""
    sizes = hashlib.sha256()
    for file in files:
        sizes.update(f"{file.name}\0{file.bytes}\n".encode())
    return {
        **recipe.data.content(),
        "window": recipe.model.window,
        "tokenizer_sha256": file_sha256(tokenizer_file),
        "files": len(files),
        "files_sha256": sizes.hexdigest(),
    }


def _existing(folder: Path, settings: dict[str, object]) -> Manifest:
    """The manifest of a folder that is there already. Raises DataError unless it is intact and has ``settings``."""
    advice = "choose another data.name or delete the folder"
    if not (folder / MANIFEST_NAME).exists():
        raise DataError(f"{folder}: exists and holds no {MANIFEST_NAME}; {advice}")
    try:
        manifest = read_manifest(folder, verify=True)
    except DataError as error:
        raise DataError(f"{error}; {advice}") from error
    found = manifest.settings
    changed = [key for key in {**settings, **found} if settings.get(key) != found.get(key)]
    if changed == ["files_sha256"]:
        raise DataError(f"{folder}: was prepared when the source files had other sizes; {advice}")
    if changed:
        listed = ", ".join(
            f"{key} {found.get(key)!r} there and {settings.get(key)!r} here" for key in changed if key != "files_sha256"
        )
        raise DataError(f"{folder}: was prepared with other settings ({listed}); {advice}")
    return manifest


def _report(result: PrepareResult) -> None:
    print(f"{'Reusing' if result.reused else 'Wrote'} token shards in {result.folder}")
    for split, part in result.manifest.splits.items():
        length = result.manifest.sequence_length
        rows = ", ".join(
            f"{count:,} {kind}" + (f" ({part.targets[kind] / (count * length):.1%} full)" if count else "")
            for kind, count in part.rows.items()
        )
        print(
            f"  {split}: {part.documents['text']:,} documents ({part.text_bytes / 1e6:.1f} MB of text), "
            f"rows of {length} tokens: {rows}, in {len(part.shards)} shards"
        )


# --- source documents


@dataclass(frozen=True)
class _File:
    name: str
    path: Path
    bytes: int


@dataclass(frozen=True)
class _Document:
    source: str
    open: Callable[[], Iterator[str]]
    """The text in pieces of about CHUNK_CHARACTERS; read twice, to choose the split and then to tokenise."""


def _find_files(patterns: tuple[str, ...], seed: int) -> list[_File]:
    """All source files, each once, in an order that depends on their names and the seed.

    Sorted by name, the first shards would hold one corner of the corpus only, and so would ``max_text_bytes``.
    """
    paths = {name: Path(name) for pattern in patterns for name in _matches(pattern)} if patterns else _stdlib()
    files = []
    for name, path in paths.items():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{name}: unsupported suffix '{path.suffix}'; sources are {', '.join(SUFFIXES)} files")
        try:
            files.append(_File(name, path, path.stat().st_size))
        except OSError as error:
            raise DataError(f"{name}: cannot be read ({error.strerror})") from error
    return sorted(files, key=lambda file: hashlib.sha256(f"{seed}\0{file.name}".encode()).digest())


def _stdlib() -> dict[str, Path]:
    root = Path(sysconfig.get_path("stdlib"))
    relative_paths = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    found = {
        f"stdlib/{path.as_posix()}": root / path for path in relative_paths if STDLIB_SKIPPED.isdisjoint(path.parts)
    }
    if not found:
        raise DataError(f"{root}: the standard library's source files are not there; name data.sources")
    return found


def _matches(pattern: str) -> list[str]:
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    files = [name for name in found if not os.path.isdir(name)]
    if not files:
        hint = f"; a folder is named with {pattern.rstrip('/')}/**/*.txt or the like" if found else ""
        raise DataError(f"data.sources: '{pattern}' matches no file{hint}")
    return files


def _documents(files: list[_File], text_field: str) -> Iterator[_Document]:
    for file in files:
        suffix = file.path.suffix.lower()
        try:
            if suffix == ".jsonl":
                yield from _jsonl_documents(file, text_field)
            elif suffix == ".parquet":
                yield from _parquet_documents(file, text_field)
            else:
                yield _Document(file.name, functools.partial(_file_chunks, file))
        except OSError as error:  # pyarrow's own have no strerror
            raise DataError(f"{file.name}: cannot be read ({error.strerror or error})") from error


def _file_chunks(file: _File) -> Iterator[str]:
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
    """Read on to the end of a line where it is near: a tokenizer's merges seldom cross one."""
    while chunk := text.read(CHUNK_CHARACTERS):
        yield chunk + text.readline(CHUNK_CHARACTERS)


def _jsonl_documents(file: _File, field: str) -> Iterator[_Document]:
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
                raise DataError(f"{source}: has no field '{field}' (data.text_field), only {_names(record)}")
            yield _text_document(source, record[field])


def _parquet_documents(file: _File, column: str) -> Iterator[_Document]:
    try:
        with pq.ParquetFile(file.path, pre_buffer=False) as source:
            schema = source.schema_arrow
            if column not in schema.names:
                raise DataError(f"{file.name}: has no column '{column}' (data.text_field), only {_names(schema.names)}")
            kind = schema.field(column).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise DataError(f"{file.name}: column '{column}' holds {kind}, not text")
            number = 0
            for batch in source.iter_batches(batch_size=64, columns=[column], use_threads=False):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield _text_document(f"{file.name}:{number}", text)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file.name}: not a readable Parquet file ({' '.join(str(error).split())})") from error


def _text_document(source: str, text: object) -> _Document:
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise DataError(f"{source}: the text is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: not valid Unicode text ({error.reason})") from error
    return _Document(source, lambda: _chunks(io.StringIO(text, newline="")))


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"


# --- tokens


def _limited(chunks: Iterator[str], max_bytes: int | None) -> Iterator[str]:
    """The first ``max_bytes`` UTF-8 bytes of a text, cut between characters."""
    left = max_bytes
    for chunk in chunks:
        if left is not None:
            encoded = chunk.encode()
            chunk, left = encoded[:left].decode(errors="ignore"), max(0, left - len(encoded))
        if chunk:
            yield chunk
        if left == 0:
            return


def _fingerprint(chunks: Iterable[str]) -> tuple[bytes, int]:
    """SHA-256 and length of a text's UTF-8 bytes."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        encoded = chunk.encode()
        digest.update(encoded)
        size += len(encoded)
    return digest.digest(), size


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """int32 [tokens]. Bytes take a shortcut past Python lists, ten times as fast."""
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) + np.int32(tokenizer.encode("\0")[0])
    return np.array(tokenizer.encode(text), dtype=np.int32)


def _pieces(tokenizer: Tokenizer, chunks: Iterable[str], piece_tokens: int) -> Iterator[np.ndarray]:
    """A document as BOS + ``piece_tokens`` tokens per piece; the last holds the rest, and EOS."""
    pending = np.empty(0, dtype=np.int32)
    for chunk in chunks:
        pending = np.concatenate([pending, _encode(tokenizer, chunk)])
        while len(pending) > piece_tokens:
            yield np.concatenate([[tokenizer.bos_id], pending[:piece_tokens]], dtype=np.int32)
            pending = pending[piece_tokens:]
    yield np.concatenate([[tokenizer.bos_id], pending, [tokenizer.eos_id]], dtype=np.int32)


# --- shards


@dataclass(frozen=True)
class _Stored:
    """One row of a shard."""

    document_id: str
    piece: int
    source: str
    kind: Kind
    tokens: np.ndarray
    answers: list[tuple[int, int]]


class _Retrieval:
    """Generates retrieval documents of one split, from a seed of its own."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, split: Split):
        self._data = recipe.data
        self._window = recipe.model.window
        self._tokenizer = tokenizer
        self._split = split
        self._rng = random.Random(f"{recipe.data.seed} {split}")

    def check(self) -> None:
        """Raise ConfigError now if documents of these lengths cannot hold what they must."""
        longest = self._data.sequence_length
        for length in self._data.retrieval_lengths:
            if length > longest:
                raise ConfigError(f"data.retrieval_lengths: {length} exceeds data.sequence_length {longest}")
        for length in {longest, *self._data.retrieval_lengths}:
            try:
                if self._data.needle_share < 1:
                    self._mqar([0] * length, full=True)
                if self._data.needle_share > 0:
                    self._needle([0] * length)
            except ConfigError as error:
                keys = "data.pairs, data.rounds and model.window"
                lengths = "data.sequence_length and data.retrieval_lengths"
                raise ConfigError(f"{keys} must fit {lengths}: {str(error).removeprefix('length: ')}") from error

    def generate(self, text: np.ndarray) -> _Stored:
        """One document planted into a random slice of ``text`` [at least sequence_length tokens]."""
        length = self._data.sequence_length
        if self._split == "train" and self._data.retrieval_lengths:
            length = self._rng.choice(self._data.retrieval_lengths)
        start = self._rng.randrange(len(text) - length + 1)
        filler = text[start : start + length].tolist()
        document = self._needle(filler) if self._rng.random() < self._data.needle_share else self._mqar(filler)
        tokens = np.array(document.tokens, dtype=np.int32)
        document_id = hashlib.sha256(tokens.tobytes()).hexdigest()[:32]
        kind: Kind = "needle" if document.kind == "needle" else "mqar"
        return _Stored(document_id, 0, "generated", kind, tokens, document.answers)

    def _mqar(self, filler: list[int], full: bool = False) -> retrieval.RetrievalDocument:
        data, rng = self._data, self._rng
        pairs, rounds = data.pairs, 1
        if self._split == "train" and not full:
            pairs, rounds = rng.randint(min(2, pairs), pairs), rng.randint(1, data.rounds)
        elif full:
            rounds = data.rounds
        return retrieval.mqar(rng, self._tokenizer, filler, len(filler), pairs, self._window, rounds)

    def _needle(self, filler: list[int]) -> retrieval.RetrievalDocument:
        depth = self._rng.random()
        return retrieval.needle(self._rng, self._tokenizer, filler, len(filler), depth, self._window)


class _SplitWriter:
    """Collects one shard's text, adds retrieval documents planted in that same text, shuffles and writes it."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, folder: Path, split: Split):
        data = recipe.data
        self._folder, self._split = folder, split
        self._sequence_length, self._packing = data.sequence_length, data.packing
        self._shard_tokens = data.shard_tokens
        # Special tokens, and the characters that facts are written with, stay out of the text they are planted in.
        self._not_filler = [tokenizer.bos_id, tokenizer.eos_id, *retrieval.reserved_ids(tokenizer)]
        self._retrieval = _Retrieval(recipe, tokenizer, split)
        self._rng = np.random.default_rng([data.seed, SPLITS.index(split)])
        share = data.retrieval_share
        # A share of 1 leaves no text rows to count by: there is one retrieval document for each that is left out.
        self._keep_text = split == "validation" or share < 1
        self._per_text_row = 0.0 if split == "validation" else share / (1 - share) if share < 1 else 1.0
        self._owed = float(data.retrieval_validation_documents) if split == "validation" else 0.0
        self._text: list[_Stored] = []
        self._tokens_held = 0.0
        self._planting_ground = np.empty(0, dtype=np.int32)
        self._text_bytes = 0
        self._documents: Counter[Kind] = Counter()
        self._rows: Counter[Kind] = Counter()
        self._tokens: Counter[Kind] = Counter()
        self._targets: Counter[Kind] = Counter()
        self._shards: list[Shard] = []
        (folder / split).mkdir()

    def add(self, document_id: str, source: str, pieces: Iterable[np.ndarray], text_bytes: int) -> None:
        self._documents["text"] += 1
        self._text_bytes += text_bytes
        for piece, tokens in enumerate(pieces):
            self._text.append(_Stored(document_id, piece, source, "text", tokens, []))
            # How many rows the shard's text fills is known once it is packed; until then it fills them to the last.
            rows = (len(tokens) - 1) / self._sequence_length
            retrieval_documents = self._per_text_row * (rows if self._packing else math.ceil(rows))
            self._tokens_held += len(tokens) * self._keep_text + retrieval_documents * self._sequence_length
            if self._tokens_held >= self._shard_tokens:
                self._close_shard()

    def finish(self) -> SplitManifest:
        """Raises DataError when the split has no row, or no text to plant its retrieval documents in."""
        if self._text:
            self._close_shard()
        rows = self._rows["text"] if self._keep_text else self._rows.total()
        if not rows or self._owed >= 1:
            raise DataError(
                f"data.sources: too little text for {self._split} ({self._documents['text']} documents of together "
                f"{self._text_bytes} bytes, for rows of {self._sequence_length} tokens); add documents or change "
                "data.validation_share (a document is a whole file, a .jsonl record or a .parquet row)"
            )
        return SplitManifest(
            text_bytes=self._text_bytes,
            documents={kind: self._documents[kind] for kind in KINDS},
            rows={kind: self._rows[kind] for kind in KINDS},
            tokens={kind: self._tokens[kind] for kind in KINDS},
            targets={kind: self._targets[kind] for kind in KINDS},
            shards=tuple(self._shards),
        )

    def _close_shard(self) -> None:
        stored = list(self._text) if self._keep_text else []
        self._owed += self._per_text_row * self._count_rows(len(piece.tokens) for piece in self._text)
        text = np.concatenate([piece.tokens for piece in self._text])
        text = text[~np.isin(text, self._not_filler)]
        if len(text) >= self._sequence_length:
            self._planting_ground = text
        if len(self._planting_ground):
            while self._owed >= 1:
                stored.append(self._retrieval.generate(self._planting_ground))
                self._owed -= 1
        self._text, self._tokens_held = [], 0.0
        if stored:
            self._write([stored[i] for i in self._rng.permutation(len(stored))])

    def _count_rows(self, lengths: Iterable[int]) -> int:
        return count_rows(np.fromiter(lengths, dtype=np.int64), self._sequence_length, self._packing)

    def _write(self, stored: list[_Stored]) -> None:
        name = f"{self._split}/{len(self._shards):05d}.parquet"
        path = self._folder / name
        lengths = np.array([len(item.tokens) for item in stored])
        group = np.cumsum(lengths) // ROW_GROUP_TOKENS
        edges = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(stored)]
        with pq.ParquetWriter(path, SHARD_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
            for start, end in itertools.pairwise(edges):
                writer.write_table(_table(stored[start:end]))
        kinds = np.array([item.kind for item in stored])
        for kind in KINDS:
            of_kind = lengths[kinds == kind]
            self._rows[kind] += self._count_rows(of_kind)
            self._tokens[kind] += int(of_kind.sum())
            self._targets[kind] += int(of_kind.sum()) - len(of_kind)
            if kind != "text":
                self._documents[kind] += len(of_kind)
        self._shards.append(
            Shard(
                file=name,
                bytes=path.stat().st_size,
                sha256=file_sha256(path),
                documents=len(stored),
                tokens=int(lengths.sum()),
            )
        )


def _table(stored: list[_Stored]) -> pa.Table:
    offsets = np.cumsum([0, *(len(item.tokens) for item in stored)], dtype=np.int32)
    tokens = pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([item.tokens for item in stored])))
    columns = [
        pa.array([item.document_id for item in stored]),
        pa.array([item.piece for item in stored], type=pa.int32()),
        pa.array([item.source for item in stored]),
        pa.array([item.kind for item in stored]),
        tokens,
        pa.array([[start for start, _ in item.answers] for item in stored], type=pa.list_(pa.int32())),
        pa.array([[end for _, end in item.answers] for item in stored], type=pa.list_(pa.int32())),
    ]
    return pa.Table.from_arrays(columns, schema=SHARD_SCHEMA)


def _write_splits(recipe: Recipe, tokenizer: Tokenizer, files: list[_File], folder: Path) -> dict[Split, SplitManifest]:
    data = recipe.data
    writers = {split: _SplitWriter(recipe, tokenizer, folder, split) for split in SPLITS}
    text_bytes = 0
    for document in _documents(files, data.text_field):
        left = None if data.max_text_bytes is None else data.max_text_bytes - text_bytes
        digest, size = _fingerprint(_limited(document.open(), left))
        if size:
            split: Split = "validation" if int.from_bytes(digest[:8]) < data.validation_share * 2**64 else "train"
            chunks = _limited(document.open(), left)
            pieces = _pieces(tokenizer, chunks, PIECE_ROWS * data.sequence_length)
            writers[split].add(digest.hex()[:32], document.source, pieces, size)
            text_bytes += size
        if left is not None and size > left - 4:  # the limit may fall inside a character of up to 4 bytes
            break
    if not text_bytes:
        raise DataError(f"data.sources: no text in {len(files)} files")
    return {split: writer.finish() for split, writer in writers.items()}
