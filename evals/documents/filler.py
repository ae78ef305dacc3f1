"""Real text for generated documents: fillers without the characters reserved for facts, and whole held-out documents.

The source is the validation split of a prepared data folder or, without one, the standard library's source files.
"""

from __future__ import annotations

import functools
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evals.documents.facts import RESERVED
from model.errors import DataError
from model.tokenizer import Tokenizer, load_tokenizer
from model.wording import count

MIN_CHARACTERS = 1_000_000
"""Amount of text from which fillers are sampled; more for longer documents."""
_COLUMNS = ["kind", "tokens", "document_id", "piece"]
_RESERVED_CHARACTER = re.compile(f"[{re.escape(RESERVED)}]")


class Filler:
    """Tokenized text, from which slices are sampled."""

    def __init__(self, tokens: np.ndarray):
        self._tokens = tokens

    def sample(self, rng: random.Random, length: int) -> np.ndarray:
        """Return ``length`` tokens from a random position, int32. Raises DataError if the text is too short."""
        if length > len(self._tokens):
            raise DataError(
                f"filler: expected text for documents of {length} tokens, found {count(len(self._tokens), 'token')}"
            )
        start = rng.randrange(len(self._tokens) - length + 1)
        return self._tokens[start : start + length]


def read_filler(data: str | None, tokenizer: Tokenizer, length: int) -> Filler:
    """Return text for documents of ``length`` tokens. Raises DataError for missing or damaged token shards."""
    characters = max(MIN_CHARACTERS, 16 * length)
    text = _library_text(characters) if data is None else _join_texts(_validation_texts(Path(data)), characters)
    return Filler(np.array(tokenizer.encode(text), dtype=np.int32))


def read_documents(data: str | None, tokenizer: Tokenizer, tokens: int, count: int) -> list[list[int]]:
    """Return the tokens of the first ``count`` held-out documents with at least ``tokens`` tokens, or of all there are.

    Raises DataError, naming the longest document, if there is none.
    """
    found: list[list[int]] = []
    longest = 0
    for text in _standard_library() if data is None else _validation_texts(Path(data)):
        document = tokenizer.encode(text)
        longest = max(longest, len(document))
        if len(document) >= tokens:
            found.append(document)
        if len(found) == count:
            break
    if not found:
        raise DataError(
            f"held-out documents: none has {tokens} tokens, the longest has {longest}; choose shorter lengths or "
            "prepare longer documents"
        )
    return found


@functools.lru_cache(maxsize=1)
def _library_text(characters: int) -> str:
    return _join_texts(_standard_library(), characters)


def _join_texts(texts: Iterable[str], characters: int) -> str:
    """Return the start of ``texts``, about ``characters`` characters, without the reserved ones."""
    parts, size = [], 0
    for text in texts:
        parts.append(_RESERVED_CHARACTER.sub("", text))
        size += len(parts[-1])
        if size >= characters:
            break
    return "".join(parts)


def _validation_texts(folder: Path) -> Iterator[str]:
    """Yield the texts of documents, joined from their pieces. A document in two shards counts as two."""
    shards = sorted((folder / "validation").glob("*.parquet"))
    if not shards:
        raise DataError(f"{folder}: no validation shards found; run the prepare step first")
    tokenizer = load_tokenizer(folder)
    for path in shards:
        try:
            with pq.ParquetFile(path) as file:
                for column in _COLUMNS:
                    if column not in file.schema_arrow.names:
                        raise DataError(f"{path}: not a token shard, because column '{column}' is missing")
                table = file.read(columns=_COLUMNS)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: damaged token shard ({' '.join(str(error).split())})") from error
        table = table.filter(pc.equal(table["kind"], "text"))
        pieces: dict[str, list[tuple[int, int]]] = {}
        for row, (document, piece) in enumerate(zip(table["document_id"].to_pylist(), table["piece"].to_pylist())):
            pieces.setdefault(document, []).append((piece, row))
        for of_document in pieces.values():
            yield tokenizer.decode([token for _, row in sorted(of_document) for token in table["tokens"][row].as_py()])


def _standard_library() -> Iterator[str]:
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    for path in paths:
        yield path.read_text(encoding="utf-8", errors="ignore")
