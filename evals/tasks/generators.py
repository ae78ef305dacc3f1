"""Documents and scores of the retrieval tasks for lm-eval, made offline from a seed.

The metadata of a task must name the ``checkpoint`` folder: its tokenizer measures lengths, and its configuration tells
which settings would be vacuous. A setting is refused with ConfigError when the model could answer without the memory
that the task is about: the asked fact inside the sliding window, or no more compressed entries than a csa layer
selects. ``data`` names a folder of prepared token shards whose validation texts are the filler; without it the source
files of the running Python's standard library are.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from evals.documents.retrieval import KEYS, MARKER, RESERVED, RetrievalDocument, mqar, needle
from model import checkpoint as checkpoints
from model.config import ModelConfig
from model.errors import ConfigError, DataError
from model.tokenizer import Tokenizer, load_tokenizer

FILLER_CHARACTERS = 1_000_000
"""Text that is read to draw fillers from; more where a document is longer."""
ATTEMPTS = 20
QUESTION = re.compile(f"{MARKER}[{KEYS}]")
NOT_FILLER = re.compile(f"[{re.escape(RESERVED)}]")

Question = dict[str, Any]
Build = Callable[[random.Random, Tokenizer, list[int], int, int], RetrievalDocument]


def mqar_questions(
    *,
    length: int,
    pairs: int,
    samples: int,
    seed: int,
    checkpoint: str | None = None,
    data: str | None = None,
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """``samples`` documents of ``length`` tokens with ``pairs`` facts; one question per fact."""

    def build(rng: random.Random, tokenizer: Tokenizer, filler: list[int], size: int, window: int) -> RetrievalDocument:
        return mqar(rng, tokenizer, filler, size, pairs, window)

    return _questions("mqar", build, length, samples, f"{seed} mqar {length} {pairs}", checkpoint, data)


def needle_questions(
    *,
    length: int,
    depth: float,
    samples: int,
    seed: int,
    checkpoint: str | None = None,
    data: str | None = None,
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """``samples`` documents of ``length`` tokens with one fact at ``depth`` (0 start, 1 last place off the window)."""

    def build(rng: random.Random, tokenizer: Tokenizer, filler: list[int], size: int, window: int) -> RetrievalDocument:
        return needle(rng, tokenizer, filler, size, depth, window)

    return _questions("needle", build, length, samples, f"{seed} needle {length} {depth}", checkpoint, data)


def recall(doc: Question, results: list[str]) -> dict[str, float]:
    """1 when the generated text begins with the value, else 0."""
    return {"recall": float(results[0].startswith(doc["answer"]))}


def _questions(
    task: str, build: Build, length: int, samples: int, seed: str, checkpoint: str | None, data: str | None
) -> dict[str, datasets.Dataset]:
    if checkpoint is None:
        raise ConfigError(f'{task}: the metadata must name a checkpoint folder, as in {{"checkpoint": "runs/a/final"}}')
    config = checkpoints.load_config(checkpoint)
    if length > config.max_positions:
        raise ConfigError(f"{task}: length {length} exceeds the model's context of {config.max_positions} tokens")
    tokenizer = load_tokenizer(checkpoint)
    text = _filler_text(data, max(FILLER_CHARACTERS, 16 * length))
    rows = []
    for document in range(samples):
        rng = random.Random(f"{seed} {document}")
        questions = _document(rng, build, tokenizer, text, length, config)
        _check_selection(task, length, 1 + len(tokenizer.encode(questions[0][0])), config)
        rows += [{"document": document, "context": context, "answer": answer} for context, answer in questions]
    return {"test": datasets.Dataset.from_list(rows)}


def _document(
    rng: random.Random, build: Build, tokenizer: Tokenizer, text: str, length: int, config: ModelConfig
) -> list[tuple[str, str]]:
    """The questions of one document, as (all that comes before the answer, answer).

    lm-eval hands texts to models, so lengths are those of the text encoded again: exactly ``length`` tokens with BOS
    where that restores the tokens, as bytes of ASCII do, and at most ``length`` otherwise.
    """
    size, problem = length, ""
    for _ in range(ATTEMPTS):
        document = build(rng, tokenizer, _filler(rng, tokenizer, text, length), size, config.window)
        excess = 1 + len(tokenizer.encode(tokenizer.decode(document.tokens[1:]))) - length
        if excess > 0:
            size, problem = size - excess, f"length: no document encodes to at most {length} tokens"
            continue
        questions = [
            (tokenizer.decode(document.tokens[1:start]), tokenizer.decode(document.tokens[start:end]))
            for start, end in document.answers
        ]
        problem = next(filter(None, (_problem(*question, tokenizer, config.window) for question in questions)), "")
        if not problem:
            return questions
    raise ConfigError(problem)


def _problem(context: str, answer: str, tokenizer: Tokenizer, window: int) -> str:
    """What is wrong with a question as the model will read it; empty when nothing is."""
    question = context[-2:]
    if not QUESTION.fullmatch(question) or context.count(question + answer) != 1 or context.count(question) != 2:
        return "tokenizer: does not restore the text of the facts, so they cannot be asked for"
    after = context[context.index(question + answer) + len(question + answer) :]
    distance = len(tokenizer.encode(after))
    if distance < window:
        return f"length: a fact stands {distance} tokens before its question, inside the window of {window} tokens"
    return ""


def _check_selection(task: str, length: int, tokens: int, config: ModelConfig) -> None:
    """Refuse a setting in which the indexer has nothing to choose."""
    entries = tokens // config.csa_ratio
    if "csa" in config.layers and entries <= config.index_topk:
        raise ConfigError(
            f"{task}: length {length} would be vacuous: {entries} compressed entries stand before the first question "
            f"and a csa layer selects {config.index_topk} of them (model.index_topk)"
        )


# --- filler text


def _filler(rng: random.Random, tokenizer: Tokenizer, text: str, length: int) -> list[int]:
    """At least ``length`` tokens from a random place of ``text``."""
    characters = length
    while True:
        if characters > len(text):
            raise DataError(f"filler: {len(text)} characters of text are too few for documents of {length} tokens")
        start = rng.randrange(len(text) - characters + 1)
        tokens = tokenizer.encode(text[start : start + characters])
        if len(tokens) >= length:
            return tokens
        characters *= 2  # several characters to a token


def _filler_text(data: str | None, characters: int) -> str:
    """About ``characters`` characters of real text without those that facts are written with."""
    parts, size = [], 0
    for text in _validation_texts(Path(data)) if data is not None else _standard_library():
        part = NOT_FILLER.sub("", text)
        parts.append(part)
        size += len(part)
        if size >= characters:
            break
    return "".join(parts)


def _validation_texts(folder: Path) -> Iterator[str]:
    shards = sorted((folder / "validation").glob("*.parquet"))
    if not shards:
        raise DataError(f"{folder}: holds no validation shards; run the prepare step first")
    tokenizer = load_tokenizer(folder)
    for path in shards:
        try:
            with pq.ParquetFile(path) as file:
                for column in ("kind", "tokens"):
                    if column not in file.schema_arrow.names:
                        raise DataError(f"{path}: is no token shard, it has no column '{column}'")
                for batch in file.iter_batches(columns=["kind", "tokens"], batch_size=256):
                    for row in batch.to_pylist():
                        if row["kind"] == "text":
                            yield tokenizer.decode(row["tokens"])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: damaged token shard ({' '.join(str(error).split())})") from error


def _standard_library() -> Iterator[str]:
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    for path in paths:
        yield path.read_text(encoding="utf-8", errors="ignore")
