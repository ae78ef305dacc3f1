"""Generated documents: their length, the place of facts, answers that follow from the text, and refused settings."""

from __future__ import annotations

import random
import re
from collections import Counter

import numpy as np
import pytest

from evals.documents import RETRIEVAL_TASKS, TASKS, task_class
from evals.documents.facts import MARKER, RESERVED, Speller
from model.config import ModelConfig
from model.errors import ConfigError
from model.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
SPELLER = Speller(TOKENIZER)
FILLER = np.array(TOKENIZER.encode("so many words in a row, and none of them is asked. " * 20), dtype=np.int32)
DISTANCE = 50


def make(name, seed=0, length=300, rounds=1, **settings):
    task = RETRIEVAL_TASKS[name].create(settings, None)
    return task.document(random.Random(seed), SPELLER, FILLER, length, DISTANCE, rounds)


def body_and_questions(document):
    """Return the text before the first question, and (prompt, answer) of each question, from the token spans."""
    text = TOKENIZER.decode(document.tokens.tolist())
    tail = "".join(prompt + answer for prompt, answer in document.questions)
    assert text.endswith(tail)
    for (start, end), (prompt, answer) in zip(document.answers, document.questions, strict=True):
        assert TOKENIZER.decode(document.tokens[start:end].tolist()) == answer
        assert TOKENIZER.decode(document.tokens[:start].tolist()).endswith(prompt)
    return text.removesuffix(tail), document.questions


def value_of(body, key):
    [value] = re.findall(f"@{key}([0-9])", body)
    return value


def follow(body, variable):
    value = re.search(f"@{variable}([A-Z0-9])", body)[1]
    return value if value.isdigit() else follow(body, value)


SOLVERS = {
    "mqar": lambda body, prompt: value_of(body, prompt[1:]),
    "needle": lambda body, prompt: value_of(body, prompt[1:]),
    "multi_key": lambda body, prompt: value_of(body, prompt[1:]),
    "residue": lambda body, prompt: value_of(body, prompt[1:]),
    "multi_value": lambda body, prompt: "".join(re.findall(f"@{prompt[2:]}([0-9])", body)),
    "multi_query": lambda body, prompt: "".join(value_of(body, key) for key in prompt[1:]),
    "variable_tracking": lambda body, prompt: follow(body, prompt[2:]),
    "frequent_words": lambda body, prompt: "".join(w for w, _ in Counter(re.findall("@([A-Z])", body)).most_common(3)),
    "selective_copy": lambda body, prompt: "".join(re.findall("@([0-9])", body)),
}


def test_every_task_has_a_solver_here():
    assert set(SOLVERS) == set(RETRIEVAL_TASKS) == set(TASKS) - {"perplexity"}


@pytest.mark.parametrize("name", RETRIEVAL_TASKS)
def test_answers_follow_from_the_text_and_lie_outside_the_distance(name):
    seen, gaps = set(), []
    for seed in range(60):
        document = make(name, seed)
        assert len(document.tokens) == 300 and document.tokens[0] == TOKENIZER.bos_id
        assert document.tokens.dtype == np.int32
        body, questions = body_and_questions(document)
        for prompt, answer in questions:
            assert SOLVERS[name](body, prompt) == answer
            seen.add(answer)
        # The filler has none of the facts' characters.
        gaps.append(len(body) - 1 - max(place for place, character in enumerate(body) if character in RESERVED))
    assert DISTANCE <= min(gaps) < DISTANCE + 15
    assert len(seen) > 3


@pytest.mark.parametrize("name", RETRIEVAL_TASKS)
def test_equal_seeds_give_equal_documents(name):
    one, again, other = make(name, 1), make(name, 1), make(name, 2)
    assert np.array_equal(one.tokens, again.tokens) and one.answers == again.answers
    assert not np.array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize("name", ["mqar", "variable_tracking"])
def test_rounds_ask_every_question_again(name):
    asked = [question for question in make(name, length=400, rounds=3).questions]
    assert Counter(asked) == {question: 3 for question in asked}


def test_needle_position_follows_depth():
    last = 300 - 1 - 2 * 3 - DISTANCE
    for depth in (0.0, 0.3, 1.0):
        body, _ = body_and_questions(make("needle", depth=depth))
        assert body.index(MARKER) == round(depth * last)


def test_values_of_a_key_are_asked_in_the_order_of_the_text():
    orders = {make("multi_value", seed).questions[0].answer for seed in range(10)}
    assert any(list(order) != sorted(order) for order in orders)


def test_chains_have_as_many_hops_as_set():
    body, questions = body_and_questions(make("variable_tracking", chains=2, hops=4))
    assert len(re.findall("@[A-Z][A-Z]", body)) == 2 * 4 and len(re.findall("@[A-Z][0-9]", body)) == len(questions) == 2


def test_word_counts_follow_a_zipf_distribution():
    body, _ = body_and_questions(make("frequent_words", length=1000, words=4, share=0.5))
    counts = [count for _, count in Counter(re.findall("@([A-Z])", body)).most_common()]
    unit = 0.5 * 1000 / 2 / (1 + 1 / 4 + 1 / 9 + 1 / 16)
    assert counts == [round(unit / rank**2) for rank in (1, 2, 3, 4)]


def test_a_residue_sweep_has_every_remainder_of_both_ratios():
    config = ModelConfig(csa_ratio=4, hca_ratio=32)
    lengths = RETRIEVAL_TASKS["residue"].create({}, config).lengths(256)
    assert max(lengths) == 256
    for ratio in (4, 32):
        assert {length % ratio for length in lengths} == set(range(ratio))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mqar", {"pairs": 1}, "mqar.pairs: must be from 2 to 26, found 1: a single pair has no distractor"),
        ("mqar", {"pairs": 27}, "mqar.pairs: must be from 2 to 26, found 27"),
        ("needle", {"depth": 1.5}, "needle.depth: must be from 0 to 1, found 1.5"),
        ("multi_key", {"keys": 1}, "multi_key.keys: must be from 2 to 26, found 1: a single key has no distractor"),
        ("multi_value", {"keys": 1}, "multi_value.keys: must be from 2 .* no distractor"),
        ("multi_value", {"values": 1}, "multi_value.values: must be from 2 to 10, found 1"),
        ("multi_query", {"keys": 4}, "multi_query.keys: must be from 5 to 26, found 4: one fact must be a distractor"),
        ("multi_query", {"queries": 1}, "multi_query.queries: must be from 2 to 10"),
        ("variable_tracking", {"hops": 0}, "variable_tracking.hops: must be from 1 .* nothing to follow"),
        ("variable_tracking", {"chains": 1}, "variable_tracking.chains: must be from 2 to 8, found 1"),
        ("frequent_words", {"words": 3}, "frequent_words.words: must be from 4 to 26, found 3: .* distractor"),
        ("frequent_words", {"share": 0}, "frequent_words.share: must be above 0"),
        ("selective_copy", {"items": 1}, "selective_copy.items: must be from 2 to 10, found 1"),
        ("residue", {"span": 1}, "residue.span: must be from 2"),
        ("perplexity", {"depth": 0}, "perplexity.depth: must be above 0"),
        ("perplexity", {"tokens": 0}, "perplexity.tokens: must be from 1"),
        ("mqar", {"hops": 3}, r"mqar.hops: is not one of its settings \(pairs\)"),
        ("mqar", {"pairs": "8"}, "mqar.pairs: expected a whole number, found '8'"),
        ("mqar", {"pairs": True}, "mqar.pairs: expected a whole number, found true"),
        ("mqar", {"pairs": 2.5}, "mqar.pairs: expected a whole number, found 2.5"),
    ],
)
def test_vacuous_and_unknown_settings_are_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        TASKS[name].create(settings, None)


def test_a_sweep_that_leaves_out_remainders_is_refused():
    with pytest.raises(ConfigError, match=r"^residue\.span: 16 is too short, because .* compression ratio 32"):
        RETRIEVAL_TASKS["residue"].create({"span": 16}, ModelConfig(hca_ratio=32))


def test_unknown_tasks_are_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"^tasks: 'ruler' is not one of mqar, needle, .*, perplexity$"):
        task_class("ruler")


def test_words_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ConfigError, match=r"^length: 60 tokens are too few for 5 words of different counts"):
        make("frequent_words", length=60, top=5, share=0.1)


@pytest.mark.parametrize("name", RETRIEVAL_TASKS)
def test_facts_that_do_not_fit_are_refused(name):
    with pytest.raises(ConfigError, match=r"^length: \d+ tokens are too few for"):
        make(name, length=DISTANCE + 5)


@pytest.mark.parametrize("name", RETRIEVAL_TASKS)
def test_training_documents_draw_valid_settings_up_to_the_given_ones(name):
    settings = {"keys": 5} if name == "multi_value" else {}
    task, rng = RETRIEVAL_TASKS[name].create(settings, None), random.Random(0)
    drawn = [task.easier(rng) for _ in range(100)]
    for setting in task.settings():
        values = {getattr(easier, setting) for easier in drawn}
        given = getattr(task, setting)
        if given is not None:
            assert max(values) == given
            varies = isinstance(given, int) and name != "residue"
            assert (len(values) > 1) == varies, setting
