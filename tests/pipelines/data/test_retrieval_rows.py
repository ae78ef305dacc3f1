"""Mixtures of retrieval documents: any task by its weight, with its settings."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from evals.documents import RETRIEVAL_TASKS
from evals.documents.facts import RESERVED
from model.errors import ConfigError
from model.tokenizer import ByteTokenizer
from pipelines.data.retrieval_rows import RetrievalGenerator
from pipelines.recipe.loading import load_recipe, recipe_from_dict

TOKENIZER = ByteTokenizer()
TEXT = np.array(TOKENIZER.encode("plain words without any reserved character, again and again. " * 50), dtype=np.int32)


def generator(split="train", **data):
    recipe = recipe_from_dict({"data": {"sequence_length": 256, **data}})
    made = RetrievalGenerator(recipe, TOKENIZER, split)
    made.check()
    return made


def test_tasks_are_drawn_by_their_weights():
    made = generator(retrieval_tasks={"mqar": 1, "multi_key": 2, "needle": 1, "selective_copy": 0})
    kinds = Counter(made.generate(TEXT).kind for _ in range(2000))
    assert set(kinds) == {"mqar", "multi_key", "needle"}
    for kind, share in (("mqar", 0.25), ("multi_key", 0.5), ("needle", 0.25)):
        assert kinds[kind] / 2000 == pytest.approx(share, abs=0.05)


def test_the_order_of_the_weights_does_not_matter():
    one = generator(retrieval_tasks={"mqar": 0.5, "multi_value": 0.5})
    other = generator(retrieval_tasks={"multi_value": 0.5, "mqar": 0.5})
    assert [one.generate(TEXT).document_id for _ in range(20)] == [other.generate(TEXT).document_id for _ in range(20)]


@pytest.mark.parametrize("name", RETRIEVAL_TASKS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_documents_of_every_task_can_be_mixed_in(name, split):
    made = generator(split, retrieval_tasks={name: 1.0}, rounds=3)
    documents = [made.generate(TEXT) for _ in range(40)]
    for document in documents:
        assert document.kind == name and document.tokens.dtype == np.int32
        text = TOKENIZER.decode(document.tokens.tolist())
        body = text[: document.answers[0][0] - 1].rstrip(RESERVED)  # without the first question
        assert not re.search("[@A-Z0-9]", body[-16:])  # the last window
        for start, end in document.answers:
            assert text[start - 1 : end - 1].isalnum()
    sizes = {len(document.tokens) for document in documents}
    assert sizes == {256} if name != "residue" else len(sizes) > 15 and max(sizes) <= 256


def test_settings_and_distance_of_documents():
    made = generator(
        "validation", retrieval_tasks={"multi_key": 1}, task_settings={"multi_key": {"keys": 4}}, retrieval_distance=150
    )
    for _ in range(20):
        text = TOKENIZER.decode(made.generate(TEXT).tokens[:-3].tolist())
        assert text.count("@") == 4
        assert "@" not in text[-150:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"retrieval_tasks": {"ruler": 1}}, "data.retrieval_tasks: 'ruler' is not one of mqar, needle, multi_key"),
        ({"retrieval_tasks": {"perplexity": 1}}, "data.retrieval_tasks: 'perplexity' is not one of mqar"),
        ({"retrieval_tasks": {"mqar": 0}}, "data.retrieval_tasks: at least one weight must be above 0"),
        ({"task_settings": {"ruler": {}}}, "data.task_settings: 'ruler' is not one of mqar"),
        (
            {"retrieval_tasks": {"multi_key": 1}, "task_settings": {"multi_key": {"keys": 1}}},
            "^data.task_settings.multi_key.keys: must be from 2 to 26, found 1",
        ),
        (
            {"task_settings": {"multi_key": {"keys": -3}}},
            "^data.task_settings.multi_key.keys: must be from 2 to 26, found -3",
        ),
        ({"pairs": 100}, "^data.pairs: must be from 2 to 26, found 100"),
        ({"task_settings": {"mqar": {"pairs": 3}}}, "the pairs of mqar are set by data.pairs"),
        (
            {"retrieval_distance": 240},
            "^data.retrieval_distance: must be at most 206, because 256 tokens must hold .* of mqar, found 240$",
        ),
        (
            {"retrieval_distance": 160, "retrieval_lengths": [128, 192]},
            "^data.retrieval_distance: must be at most 78, because 128 tokens must hold .* of mqar, found 160$",
        ),
        ({"rounds": 9}, "^data.sequence_length: 256 tokens are too few for 8 facts of mqar .*, asked 9 times$"),
        ({"retrieval_lengths": [32]}, "^data.retrieval_lengths: 32 tokens are too few for 8 facts of mqar at least 16"),
        ({"retrieval_tasks": {"mqar": -1}}, "data.retrieval_tasks.mqar"),
    ],
)
def test_unknown_and_impossible_mixtures_are_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        generator(**data)


def test_a_mixture_of_a_later_file_replaces_the_earlier_one(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {retrieval_tasks: {mqar: 1, needle: 1}}\n")
    (tmp_path / "b.yaml").write_text("data: {retrieval_tasks: {multi_key: 1}}\n")
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    assert load_recipe(files).data.retrieval_tasks == {"multi_key": 1}
    given = ["data.retrieval_tasks={residue: 2}"]
    assert load_recipe(files, given).data.retrieval_tasks == {"residue": 2}
