"""Rows of the tasks for lm-eval: the text that models read, lengths in their tokens, and refused settings."""

from __future__ import annotations

import math
import re
import string

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from retrieval_data import CONFIG, DISTANCE, save_checkpoint, write_shards
from tokenizer_files import byte_fallback, byte_level, unigram, write_files
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from evals.documents import RETRIEVAL_TASKS, TASKS
from evals.documents.facts import KEYS
from evals.run import TASK_FOLDER, evaluate
from evals.tasks.generators import retrieval_questions, text_spans
from model.errors import ConfigError, DataError
from model.tokenizer import ByteTokenizer, load_tokenizer


def mqar_questions(**metadata):
    return retrieval_questions(task="mqar", **metadata)["test"]


def needle_questions(**metadata):
    return retrieval_questions(task="needle", **metadata)["test"]


def check_questions(questions, tokenizer, length, distance=DISTANCE):
    """Check that each question has a single fact, at least ``distance`` tokens before it; return lengths."""
    sizes = []
    for question in questions:
        context, answer = question["context"], question["answer"]
        key = context[-2:]
        assert re.fullmatch("@[A-Z]", key)
        assert context.count(key) == 2
        place = context.index(key + answer) + len(key + answer)
        assert len(tokenizer.encode(context[place:])) >= distance
        sizes.append(1 + len(tokenizer.encode(context + answer)))
    assert max(sizes) <= length
    return sizes


@pytest.mark.parametrize("length", [128, 129, 130, 131, 256])
def test_mqar_documents_have_the_exact_length_and_ask_every_fact(checkpoint, length):
    questions = mqar_questions(checkpoint=checkpoint, length=length, pairs=4, samples=6, seed=1)
    assert len(questions) == 24
    sizes = check_questions(questions, ByteTokenizer(), length)
    for document in range(6):
        mine = [i for i, question in enumerate(questions) if question["document"] == document]
        assert len({questions[i]["context"][-2:] for i in mine}) == 4
        assert max(sizes[i] for i in mine) == length


def test_needle_position_follows_depth(checkpoint):
    def place(depth):
        questions = needle_questions(checkpoint=checkpoint, length=512, depth=depth, samples=8, seed=1)
        assert set(check_questions(questions, ByteTokenizer(), 512)) == {512}
        return {q["context"].index(q["context"][-2:]) for q in questions}

    # 512 tokens hold BOS and the fact twice; the stacked windows follow the last position.
    last = 512 - 1 - 2 * 3 - DISTANCE
    assert place(0.0) == {0}
    assert place(0.5) == {round(0.5 * last)}
    assert place(1.0) == {last}


def test_equal_seeds_give_equal_documents(checkpoint):
    def contexts(seed, samples=3):
        made = mqar_questions(checkpoint=checkpoint, length=256, pairs=4, samples=samples, seed=seed)
        return made["context"][:12]

    assert contexts(1) == contexts(1)
    assert contexts(1) == contexts(1, samples=5)  # additional samples do not change the first ones
    assert contexts(1) != contexts(2)


def test_filler_is_the_validation_text(checkpoint, tmp_path):
    false_facts = " ".join(f"@{key}0" for key in KEYS)
    data = write_shards(tmp_path, [f"alpha beta gamma delta. {false_facts} " * 20], ByteTokenizer())
    questions = mqar_questions(checkpoint=checkpoint, length=256, pairs=4, samples=8, seed=1, data=data)
    check_questions(questions, ByteTokenizer(), 256)
    text = "".join(questions["context"])
    assert "alpha beta" in text
    assert "retrieval" not in text


def test_multibyte_filler(checkpoint, tmp_path):
    """Slicing such text by tokens splits characters; the model must still read valid text of the right length."""
    data = write_shards(tmp_path, ["长上下文记忆检索测试。" * 300], ByteTokenizer())
    questions = mqar_questions(checkpoint=checkpoint, length=256, pairs=4, samples=4, seed=1, data=data)
    sizes = check_questions(questions, ByteTokenizer(), 256)
    assert max(sizes) > 230


def bpe(folder):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = [path.read_text() for path in sorted(TASK_FOLDER.glob("*.py"))]
    backend.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json")


def test_bpe_tokenizer(tmp_path):
    """Merges across the boundaries of a fact change a document's length in tokens, but not its questions."""
    tokenizer = bpe(tmp_path)
    checkpoint = save_checkpoint(tmp_path / "final", CONFIG.replace(vocab_size=tokenizer.vocab_size), tokenizer)
    questions = mqar_questions(checkpoint=checkpoint, length=256, pairs=4, samples=6, seed=1)
    sizes = check_questions(questions, tokenizer, 256)
    assert max(sizes) > 230
    assert len(questions["context"][0]) > 300  # characters; lengths count the tokens of this tokenizer


@pytest.mark.parametrize("vocabulary", [unigram, byte_fallback])
def test_tokenizers_that_put_a_space_in_front(tmp_path, vocabulary):
    tokenizer = load_tokenizer(write_files(tmp_path / "in", vocabulary(string.printable.strip() + "\n")))
    checkpoint = save_checkpoint(tmp_path / "final", CONFIG.replace(vocab_size=tokenizer.vocab_size), tokenizer)
    questions = mqar_questions(checkpoint=checkpoint, length=256, pairs=4, samples=6, seed=1)
    assert max(check_questions(questions, tokenizer, 256)) > 250


def test_tokenizer_that_loses_a_fact_is_refused(tmp_path):
    def characters(name, alphabet, normalizer=None):
        backend = Backend(
            models.WordLevel({"<s>": 0, "</s>": 1, "?": 2, **{c: i + 3 for i, c in enumerate(alphabet)}}, "?")
        )
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        backend.decoder = decoders.Fuse()
        if normalizer is not None:
            backend.normalizer = normalizer
        backend.save(str(tmp_path / f"{name}.json"))
        return save_checkpoint(tmp_path / name, CONFIG, load_tokenizer(tmp_path / f"{name}.json"))

    plain = characters("plain", string.printable)
    assert len(mqar_questions(checkpoint=plain, length=1024, pairs=20, samples=1, seed=1)) == 20
    without_at = characters("without_at", string.printable.replace("@", ""))
    folds_case = characters("folds_case", string.printable, normalizers.Lowercase())  # makes two facts share a key
    for folder in (without_at, folds_case):
        with pytest.raises(ConfigError, match="the tokenizer does not restore the text of facts"):
            mqar_questions(checkpoint=folder, length=1024, pairs=20, samples=1, seed=1)


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({}, 70, "70 tokens are too few for 4 facts of mqar at least 48 tokens before the first question"),
        (
            {"index_topk": 64},
            256,
            r"^length: 256 proves nothing for mqar, because there are .* select 64",
        ),
        (
            {"csa_ratio": 32, "hca_ratio": 64},
            256,
            r"proves nothing for mqar, because there are [78] compressed",
        ),
        ({"window": 80}, 256, "at least 240 tokens before"),
        ({}, 1025, "^length: 1025 exceeds the model's context; choose lengths up to 1024 tokens"),
    ],
)
def test_vacuous_settings_are_refused(tmp_path, changes, length, message):
    folder = save_checkpoint(tmp_path / "final", CONFIG.replace(**changes))
    with pytest.raises(ConfigError, match=message):
        mqar_questions(checkpoint=folder, length=length, pairs=4, samples=2, seed=1)
    with pytest.raises(ConfigError):
        evaluate(folder, ["mqar"], [length], samples=2, settings={"mqar": {"pairs": 4}})


def test_vacuous_needles_are_refused(tmp_path):
    folder = save_checkpoint(tmp_path / "final", CONFIG.replace(index_topk=64))
    with pytest.raises(ConfigError, match=r"^length: 256 proves nothing for needle, because there are 63 compressed"):
        needle_questions(checkpoint=folder, length=256, depth=0.5, samples=2, seed=1)
    # With another block of tokens, the indexer must leave one entry out.
    with pytest.raises(ConfigError, match="64 compressed entries"):
        needle_questions(checkpoint=folder, length=260, depth=0.5, samples=2, seed=1)
    assert needle_questions(checkpoint=folder, length=264, depth=0.5, samples=2, seed=1)


def test_a_model_without_an_indexer_is_never_vacuous(tmp_path):
    folder = save_checkpoint(tmp_path / "final", CONFIG.replace(layers=("gqa",), index_topk=64))
    assert len(mqar_questions(checkpoint=folder, length=256, pairs=4, samples=2, seed=1)) == 8


@pytest.mark.parametrize("name", RETRIEVAL_TASKS)
def test_every_task_has_its_answers_outside_the_stacked_windows(checkpoint, name):
    rows = retrieval_questions(task=name, checkpoint=checkpoint, length=300, samples=40, seed=1)["test"]
    for row in rows:
        assert 1 + len(row["context"]) + len(row["answer"]) <= row["length"] <= 300
        body = row["context"].rstrip("@" + string.ascii_uppercase + string.digits)  # the questions
        assert not re.search("[@A-Z0-9]", body[-DISTANCE + 1 :])
    assert {row["document"] for row in rows} == set(range(40))


def test_a_residue_sweep_makes_a_document_of_every_length(checkpoint):
    rows = retrieval_questions(task="residue", checkpoint=checkpoint, length=300, samples=64, seed=1)["test"]
    lengths = [1 + len(row["context"]) + 1 for row in rows]
    assert lengths == rows["length"] and sorted(lengths) == sorted([*range(269, 301)] * 2)
    with pytest.raises(ConfigError, match=r"^samples: .* document of each of 32 lengths of residue, found 31"):
        retrieval_questions(task="residue", checkpoint=checkpoint, length=300, samples=31, seed=1)


def test_spans_of_held_out_documents(checkpoint, tmp_path):
    texts = ["".join(f"{letter}{i} " for i in range(300)) for letter in "abc"] + ["too short"]
    data = write_shards(tmp_path, texts, ByteTokenizer())
    given = {"task": "perplexity", "checkpoint": checkpoint, "data": data, "length": 256, "samples": 6, "seed": 1}
    begins = {}
    for depth in (0.5, 1.0):
        rows = text_spans(depth=depth, tokens=20, **given)["test"]
        assert rows["document"] == [0, 1, 2, 0, 1, 2]
        for i, row in enumerate(rows):
            whole = row["context"] + row["continuation"]
            assert whole in texts[row["document"]]
            assert len(whole) == round(depth * 255) and row["tokens"] == len(row["continuation"])
            assert 20 <= row["tokens"] <= 22 and not row["context"][-1].isspace()
            begins.setdefault(i, set()).add(whole[:100])
    assert all(len(begin) == 1 for begin in begins.values())  # the same text at every depth
    assert len(set(map(str, begins.values()))) == 6
    with pytest.raises(DataError, match="held-out documents: none has 1023 tokens, the longest has 9"):
        text_spans(
            **{**given, "length": 1024, "data": write_shards(tmp_path / "short", ["too short"], ByteTokenizer())}
        )
    with pytest.raises(ConfigError, match=r"^length: 256 is too short, because the 32 tokens before depth 0\.1 have"):
        text_spans(depth=0.1, **given)


def test_spans_divide_at_token_borders(tmp_path):
    """A tokenizer that merges letters; lm-eval's models encode context and whole apart."""
    tokenizer = bpe(tmp_path)
    folder = save_checkpoint(tmp_path / "final", CONFIG.replace(vocab_size=tokenizer.vocab_size), tokenizer)
    rows = text_spans(task="perplexity", checkpoint=folder, length=200, samples=8, seed=1)["test"]
    for row in rows:
        context, whole = tokenizer.encode(row["context"]), tokenizer.encode(row["context"] + row["continuation"])
        assert whole[: len(context)] == context and len(whole) - len(context) == row["tokens"] >= 32
        assert len(whole) <= 199


def test_spans_divide_no_token_that_ends_with_a_space(tmp_path):
    tokenizer = load_tokenizer(write_files(tmp_path / "in", byte_level(merges=[("a", "Ġ")])))
    folder = save_checkpoint(tmp_path / "final", CONFIG.replace(vocab_size=tokenizer.vocab_size), tokenizer)
    data = write_shards(tmp_path / "data", ["xa " * 300], tokenizer)
    rows = text_spans(task="perplexity", checkpoint=folder, data=data, length=200, samples=8, seed=1)["test"]
    for row in rows:
        context, whole = tokenizer.encode(row["context"]), tokenizer.encode(row["context"] + row["continuation"])
        assert whole[: len(context)] == context and len(whole) - len(context) == row["tokens"] >= 32


def test_spans_of_a_tokenizer_that_adds_a_space_in_front(tmp_path):
    content = byte_level()
    content["pre_tokenizer"] = {**content["pre_tokenizer"], "add_prefix_space": True}
    tokenizer = load_tokenizer(write_files(tmp_path / "in", content))
    folder = save_checkpoint(tmp_path / "final", CONFIG.replace(vocab_size=tokenizer.vocab_size), tokenizer)
    data = write_shards(tmp_path / "data", ["words without one in front, " * 40], tokenizer)
    rows = text_spans(task="perplexity", checkpoint=folder, data=data, length=200, samples=8, seed=1)["test"]
    for row in rows:
        context, whole = tokenizer.encode(row["context"]), tokenizer.encode(row["context"] + row["continuation"])
        assert whole[: len(context)] == context and len(whole) - len(context) == row["tokens"] >= 32


class LookupLM(LM):
    """Answer by looking the key up in the context; wrongly for keys before N. Likelihood: one nat per character."""

    def generate_until(self, requests):
        answers = []
        for request in requests:
            context, _ = request.args
            answer = re.search(re.escape(context[-2:]) + "(.)", context).group(1)
            answers.append("?" if context[-1] < "N" else answer + "!")
        return answers

    def loglikelihood(self, requests):
        return [(-float(len(request.args[1])), False) for request in requests]

    loglikelihood_rolling = None


def run_yaml(task, **metadata):
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata=metadata)
    return simple_evaluate(LookupLM(), tasks=[task], task_manager=manager, bootstrap_iters=0)


@pytest.mark.parametrize("task", ["mqar", "needle"])
def test_yaml_tasks_work_with_any_lm_eval_model(checkpoint, task):
    results = run_yaml(task, checkpoint=checkpoint, samples=40)
    samples = results["samples"][task]
    assert len(samples) == (320 if task == "mqar" else 40)
    share = sum(sample["doc"]["context"][-1] >= "N" for sample in samples) / len(samples)
    assert 0.2 < share < 0.8
    assert results["results"][task]["recall,none"] == pytest.approx(share)
    error = results["results"][task]["recall_standard_error,none"]
    independent = math.sqrt(share * (1 - share) / len(samples))
    assert independent / 2 < error < 2 * independent


def test_yaml_perplexity(checkpoint):
    results = run_yaml("perplexity", checkpoint=checkpoint, samples=3)["results"]["perplexity"]
    assert results["perplexity,none"] == pytest.approx(math.e)
    assert results["likelihood,none"] == pytest.approx(1 / math.e)
    assert results["likelihood_standard_error,none"] == pytest.approx(0, abs=1e-9)


def test_every_task_has_a_yaml_file_of_its_name(checkpoint):
    assert {path.stem for path in TASK_FOLDER.glob("*.yaml")} == set(TASKS)
    manager = TaskManager(
        include_path=str(TASK_FOLDER), include_defaults=False, metadata={"checkpoint": checkpoint, "samples": 32}
    )
    for name in TASKS:
        task = manager.load([name])["tasks"][name]
        assert len({row["document"] for row in task.dataset["test"]}) == 32
        stated = task.config.metadata
        for setting in TASKS[name].settings():
            if setting in stated and setting != "depth":
                assert stated[setting] == getattr(TASKS[name](), setting)


@pytest.mark.parametrize("task", TASKS)
def test_metadata_without_a_model(task):
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False)
    with pytest.raises(ConfigError, match=f"{task}: the metadata must name a checkpoint folder"):
        manager.load([task])
