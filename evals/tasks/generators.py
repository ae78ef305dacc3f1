"""Documents of the tasks for lm-eval, generated offline from a seed.

The functions here are ``custom_dataset`` of the YAML files, and get a task's metadata. :mod:`evals.source` says which
keys name the model; all others are the settings of the task (:mod:`evals.documents`) and:

* ``length``: length of the documents in tokens, with BOS and the answers;
* ``samples``: number of documents, and ``seed``;
* ``distance``: tokens between the last fact and the first question; by default the model's stacked windows;
* ``data``: a folder of prepared token shards, whose validation texts become the text; by default the standard library's
  source files.

Equal metadata and tokenizers give equal documents.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import datasets

from evals.documents import task_class
from evals.documents.base import Document, RetrievalTask, Task
from evals.documents.facts import MARKER, Speller
from evals.documents.filler import Filler, read_documents, read_filler
from evals.documents.perplexity import Perplexity
from evals.source import Source, load_source
from model.errors import ConfigError
from model.tokenizer import Tokenizer
from model.wording import count, quote

MAX_ATTEMPTS = 20

Row = dict[str, Any]


def retrieval_questions(
    *, task: str, length: int, samples: int, seed: int, **metadata: Any
) -> dict[str, datasets.Dataset]:
    """Return rows {"document", "length", "context", "answer"}: one per question of ``samples`` documents.

    Raises ConfigError for a vacuous or impossible setting, CheckpointError and DataError for unreadable files.
    """
    _check_counts(length=length, samples=samples)
    source = load_source(task, metadata)
    source.check_length(length)
    built = _create(task, metadata, source)
    assert isinstance(built, RetrievalTask)
    distance = source.distance(task, metadata.get("distance"))
    lengths = built.lengths(length)
    if samples < built.fewest_samples:
        raise ConfigError(
            f"expected at least one document of each of {len(lengths)} lengths of {task}, found {samples}",
            "samples",
        )
    speller = Speller(source.tokenizer)
    speller.check()
    filler = read_filler(metadata.get("data"), source.tokenizer, length)
    rows: list[Row] = []
    for document in range(samples):
        rng = random.Random(f"{seed} {task} {length} {_settings(built)} {document}")
        size = lengths[document % len(lengths)]
        pairs, tokens = _generate(rng, built, speller, filler, size, distance)
        source.check_selection(task, size, tokens)
        rows += [{"document": document, "length": size, "context": text, "answer": answer} for text, answer in pairs]
    return {"test": datasets.Dataset.from_list(rows)}


def text_spans(*, task: str, length: int, samples: int, seed: int, **metadata: Any) -> dict[str, datasets.Dataset]:
    """Return rows {"document", "length", "context", "continuation", "tokens"}, one per span of a held-out document.

    Where there are fewer documents than ``samples``, they take turns. Errors are those of :func:`retrieval_questions`.
    """
    _check_counts(length=length, samples=samples)
    source = load_source(task, metadata)
    source.check_length(length)
    built = _create(task, metadata, source)
    assert isinstance(built, Perplexity)
    texts = read_documents(metadata.get("data"), source.tokenizer, length - 1, samples)
    rows: list[Row] = []
    for sample in range(samples):
        document = sample % len(texts)
        rng = random.Random(f"{seed} {task} {length} {sample}")  # the same text at every depth
        context, continuation, tokens = built.span(rng, source.tokenizer, texts[document], length)
        row: Row = {"document": document, "length": length, "context": context, "continuation": continuation}
        rows.append({**row, "tokens": tokens})
    return {"test": datasets.Dataset.from_list(rows)}


def _create(task: str, metadata: Mapping[str, Any], source: Source) -> Task:
    made = task_class(task)
    return made.create({name: metadata[name] for name in made.settings() if name in metadata}, source.config)


def _settings(task: Task) -> str:
    return " ".join(str(getattr(task, name)) for name in task.settings())


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"expected a whole number of at least 1, found {quote(value)}", name)


def _generate(
    rng: random.Random, task: RetrievalTask, speller: Speller, filler: Filler, length: int, distance: int
) -> tuple[list[tuple[str, str]], int]:
    """Return the questions of one document as (context, answer), and the tokens before the first question.

    lm-eval passes text to models, so lengths refer to the re-encoded text: exactly ``length`` tokens with BOS if
    encoding restores the tokens, as for ASCII bytes, and at most ``length`` otherwise.
    """
    tokenizer = speller.tokenizer
    size = length
    problem: ConfigError | None = None
    for _ in range(MAX_ATTEMPTS):
        document = task.document(rng, speller, filler.sample(rng, length), size, distance)
        text = tokenizer.decode(document.tokens[1:].tolist())
        excess = 1 + len(tokenizer.encode(text)) - length
        if excess > 0:
            size -= excess
            problem = ConfigError(f"no generated document of {task.name} encodes to at most {length} tokens", "length")
            continue
        body = text.removesuffix("".join(prompt + answer for prompt, answer in document.questions))
        problem = _find_problem(document, text, body, tokenizer, distance)
        if problem is None:
            pairs, context = [], body
            for prompt, answer in document.questions:
                pairs.append((context + prompt, answer))
                context += prompt + answer
            return pairs, 1 + len(tokenizer.encode(body))
    assert problem is not None
    raise problem


def _find_problem(document: Document, text: str, body: str, tokenizer: Tokenizer, distance: int) -> ConfigError | None:
    """Return an error if a fact is damaged or too near in the text that the model reads, else None."""
    facts = "".join("".join(fact) for fact in document.facts)
    offset = -1
    for fact in document.facts:
        offset = body.find("".join(fact), offset + 1)
        if offset < 0:
            break
    if body == text or offset < 0 or body.count(MARKER) != facts.count(MARKER):
        return ConfigError("the tokenizer does not restore the text of facts")
    after = body[offset + len("".join(document.facts[-1])) :]
    between = len(tokenizer.encode(after))
    if between < distance:
        reason = f"a fact is {count(between, 'token')} before the first question, closer than {distance:,}"
        return ConfigError(reason, "length")
    return None
