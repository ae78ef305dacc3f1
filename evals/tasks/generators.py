"""Documents and metric of the retrieval tasks for lm-eval, generated offline from a seed.

A task's metadata must name the ``checkpoint`` folder: its tokenizer measures lengths, and its configuration determines
which settings are vacuous. A vacuous setting raises ConfigError: the model could answer without long-range memory,
because the fact lies within the sliding window or a csa layer selects all compressed entries. ``data`` names a folder
of prepared token shards, whose validation texts become the filler; the default is the standard library's source files.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import datasets

from evals.documents.filler import read_filler, sample_filler
from evals.documents.retrieval import KEYS, MARKER, RetrievalDocument, check_tokenizer, mqar, needle
from model import checkpoint as checkpoints
from model.config import ModelConfig
from model.errors import ConfigError
from model.tokenizer import Tokenizer, load_tokenizer

MIN_FILLER_CHARACTERS = 1_000_000
"""Amount of text from which fillers are sampled; more for longer documents."""
MAX_ATTEMPTS = 20
QUESTION = re.compile(f"{MARKER}[{KEYS}]")

Question = dict[str, Any]
DocumentBuilder = Callable[[random.Random, Tokenizer, list[int], int, int], RetrievalDocument]


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
    """Return ``samples`` documents of ``length`` tokens with ``pairs`` facts and one question per fact."""

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
    """Return ``samples`` documents of ``length`` tokens with one fact at ``depth`` (see :func:`needle`)."""

    def build(rng: random.Random, tokenizer: Tokenizer, filler: list[int], size: int, window: int) -> RetrievalDocument:
        return needle(rng, tokenizer, filler, size, depth, window)

    return _questions("needle", build, length, samples, f"{seed} needle {length} {depth}", checkpoint, data)


def recall(doc: Question, results: list[str]) -> dict[str, float]:
    """Score 1 if the generated text starts with the value, else 0."""
    return {"recall": float(results[0].startswith(doc["answer"]))}


def _questions(
    task: str, build: DocumentBuilder, length: int, samples: int, seed: str, checkpoint: str | None, data: str | None
) -> dict[str, datasets.Dataset]:
    if checkpoint is None:
        raise ConfigError(f'{task}: the metadata must name a checkpoint folder, as in {{"checkpoint": "runs/a/final"}}')
    config = checkpoints.load_config(checkpoint)
    if length > config.max_positions:
        raise ConfigError(f"{task}: length {length} exceeds the model's context of {config.max_positions} tokens")
    tokenizer = load_tokenizer(checkpoint, model_vocab_size=config.vocab_size)
    check_tokenizer(tokenizer)
    text = read_filler(data, max(MIN_FILLER_CHARACTERS, 16 * length))
    rows = []
    for document in range(samples):
        rng = random.Random(f"{seed} {document}")
        questions = _generate_document(rng, build, tokenizer, text, length, config)
        _check_selection(task, length, 1 + len(tokenizer.encode(questions[0][0])), config)
        rows += [{"document": document, "context": context, "answer": answer} for context, answer in questions]
    return {"test": datasets.Dataset.from_list(rows)}


def _generate_document(
    rng: random.Random, build: DocumentBuilder, tokenizer: Tokenizer, text: str, length: int, config: ModelConfig
) -> list[tuple[str, str]]:
    """Return the questions of one document as (context, answer).

    lm-eval passes text to models, so lengths refer to the re-encoded text: exactly ``length`` tokens with BOS if
    encoding restores the tokens, as for ASCII bytes, and at most ``length`` otherwise.
    """
    size, problem = length, ""
    for _ in range(MAX_ATTEMPTS):
        document = build(rng, tokenizer, sample_filler(rng, tokenizer, text, length), size, config.window)
        excess = 1 + len(tokenizer.encode(tokenizer.decode(document.tokens[1:]))) - length
        if excess > 0:
            size, problem = size - excess, f"length: no generated document encodes to at most {length} tokens"
            continue
        questions = [
            (tokenizer.decode(document.tokens[1:start]), tokenizer.decode(document.tokens[start:end]))
            for start, end in document.answers
        ]
        problem = next(filter(None, (_find_problem(*question, tokenizer, config.window) for question in questions)), "")
        if not problem:
            return questions
    raise ConfigError(problem)


def _find_problem(context: str, answer: str, tokenizer: Tokenizer, window: int) -> str:
    """Return a message if the question is invalid in the text that the model reads, else an empty string."""
    question = context[-2:]
    if not QUESTION.fullmatch(question) or context.count(question + answer) != 1 or context.count(question) != 2:
        return "tokenizer: decoding does not restore the text of the facts"
    after = context[context.index(question + answer) + len(question + answer) :]
    distance = len(tokenizer.encode(after))
    if distance < window:
        return f"length: a fact is {distance} tokens before its question, inside the window of {window} tokens"
    return ""


def _check_selection(task: str, length: int, tokens: int, config: ModelConfig) -> None:
    """Raise ConfigError if the indexer would select all entries."""
    if not config.indexed_layers:
        return
    entries = min(tokens // ratio for ratio in config.indexer_ratios.values())
    if entries <= config.index_topk:
        raise ConfigError(
            f"{task}: length {length} is vacuous: there are {entries} compressed entries before the first question, "
            f"and indexers select {config.index_topk} of them (index_topk)"
        )
