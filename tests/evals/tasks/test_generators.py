"""Retrieval tasks: generated questions, their answers, and refused vacuous settings."""

from __future__ import annotations

import re
import string

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from retrieval_data import CONFIG, save_checkpoint, write_shards
from tokenizer_files import byte_fallback, unigram, write_files
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from evals.documents.retrieval import KEYS
from evals.run import TASK_FOLDER, evaluate
from evals.tasks.generators import QUESTION, mqar_questions, needle_questions
from model.errors import ConfigError
from model.tokenizer import ByteTokenizer, load_tokenizer


def check_questions(questions, tokenizer, length, window):
    """Check that each question has a single fact, at least ``window`` tokens before it; return lengths."""
    sizes = []
    for question in questions:
        context, answer = question["context"], question["answer"]
        key = context[-2:]
        assert QUESTION.fullmatch(key)
        assert context.count(key) == 2
        place = context.index(key + answer) + len(key + answer)
        assert len(tokenizer.encode(context[place:])) >= window
        sizes.append(1 + len(tokenizer.encode(context + answer)))
    assert max(sizes) <= length
    return sizes


@pytest.mark.parametrize("length", [128, 129, 130, 131, 256])
def test_mqar_documents_have_the_exact_length_and_ask_every_fact(checkpoint, length):
    questions = mqar_questions(checkpoint=checkpoint, length=length, pairs=4, samples=6, seed=1)["test"]
    assert len(questions) == 24
    sizes = check_questions(questions, ByteTokenizer(), length, CONFIG.window)
    for document in range(6):
        mine = [i for i, question in enumerate(questions) if question["document"] == document]
        assert len({questions[i]["context"][-2:] for i in mine}) == 4
        assert max(sizes[i] for i in mine) == length


def test_needle_position_follows_depth(checkpoint):
    def place(depth):
        questions = needle_questions(checkpoint=checkpoint, length=512, depth=depth, samples=8, seed=1)["test"]
        assert set(check_questions(questions, ByteTokenizer(), 512, CONFIG.window)) == {512}
        return {q["context"].index(q["context"][-2:]) for q in questions}

    # 512 tokens hold BOS and the fact twice; the last position leaves a window between the fact and its question.
    last = 512 - 1 - 2 * 3 - CONFIG.window
    assert place(0.0) == {0}
    assert place(0.5) == {round(0.5 * last)}
    assert place(1.0) == {last}


def test_equal_seeds_give_equal_documents(checkpoint):
    def contexts(seed, samples=3):
        made = mqar_questions(checkpoint=checkpoint, length=256, pairs=4, samples=samples, seed=seed)
        return made["test"]["context"][:12]

    assert contexts(1) == contexts(1)
    assert contexts(1) == contexts(1, samples=5)  # additional samples do not change the first ones
    assert contexts(1) != contexts(2)


def test_filler_is_the_validation_text(checkpoint, tmp_path):
    false_facts = " ".join(f"@{key}0" for key in KEYS)
    data = write_shards(tmp_path, [f"alpha beta gamma delta. {false_facts} " * 20], ByteTokenizer())
    questions = mqar_questions(checkpoint=checkpoint, length=256, pairs=4, samples=8, seed=1, data=data)["test"]
    check_questions(questions, ByteTokenizer(), 256, CONFIG.window)
    text = "".join(questions["context"])
    assert "alpha beta" in text
    assert "retrieval" not in text


def test_multibyte_filler(checkpoint, tmp_path):
    """Slicing such text by tokens splits characters; the model must still read valid text of the right length."""
    data = write_shards(tmp_path, ["长上下文记忆检索测试。" * 300], ByteTokenizer())
    questions = mqar_questions(checkpoint=checkpoint, length=256, pairs=4, samples=4, seed=1, data=data)["test"]
    sizes = check_questions(questions, ByteTokenizer(), 256, CONFIG.window)
    assert max(sizes) > 230


def test_bpe_tokenizer(tmp_path):
    """Merges across the boundaries of a fact change a document's length in tokens, but not its questions."""
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
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    checkpoint = save_checkpoint(tmp_path / "final", CONFIG.replace(vocab_size=tokenizer.vocab_size), tokenizer)
    questions = mqar_questions(checkpoint=checkpoint, length=256, pairs=4, samples=6, seed=1)["test"]
    sizes = check_questions(questions, tokenizer, 256, CONFIG.window)
    assert max(sizes) > 230
    assert len(questions["context"][0]) > 300  # characters; lengths count the tokens of this tokenizer


@pytest.mark.parametrize("vocabulary", [unigram, byte_fallback])
def test_tokenizers_that_put_a_space_in_front(tmp_path, vocabulary):
    tokenizer = load_tokenizer(write_files(tmp_path / "in", vocabulary(string.printable.strip() + "\n")))
    checkpoint = save_checkpoint(tmp_path / "final", CONFIG.replace(vocab_size=tokenizer.vocab_size), tokenizer)
    questions = mqar_questions(checkpoint=checkpoint, length=256, pairs=4, samples=6, seed=1)["test"]
    assert max(check_questions(questions, tokenizer, 256, CONFIG.window)) > 250


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
    assert len(mqar_questions(checkpoint=plain, length=1024, pairs=20, samples=1, seed=1)["test"]) == 20
    without_at = characters("without_at", string.printable.replace("@", ""))
    folds_case = characters("folds_case", string.printable, normalizers.Lowercase())  # makes two facts share a key
    for folder in (without_at, folds_case):
        with pytest.raises(ConfigError, match="tokenizer: decoding does not restore the text of the facts"):
            mqar_questions(checkpoint=folder, length=1024, pairs=20, samples=1, seed=1)


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({}, 40, "too few for 4 facts outside a window of 16"),
        ({"index_topk": 64}, 256, r"length 256 is vacuous: there are \d+ compressed entries .* select 64"),
        ({"csa_ratio": 32, "hca_ratio": 64}, 256, r"is vacuous: there are [78] compressed entries"),
        ({"window": 250}, 256, "outside a window of 250"),
        ({}, 1025, "length 1025 exceeds the model's context of 1024"),
    ],
)
def test_vacuous_settings_are_refused(tmp_path, changes, length, message):
    folder = save_checkpoint(tmp_path / "final", CONFIG.replace(**changes))
    with pytest.raises(ConfigError, match=message):
        mqar_questions(checkpoint=folder, length=length, pairs=4, samples=2, seed=1)
    with pytest.raises(ConfigError):
        evaluate(folder, ["mqar"], [length], samples=2, pairs=4)


def test_vacuous_needles_are_refused(tmp_path):
    folder = save_checkpoint(tmp_path / "final", CONFIG.replace(index_topk=64))
    with pytest.raises(ConfigError, match="needle: length 256 is vacuous: there are 63 compressed entries"):
        needle_questions(checkpoint=folder, length=256, depth=0.5, samples=2, seed=1)
    # With another block of tokens, the indexer must leave one entry out.
    with pytest.raises(ConfigError, match="64 compressed entries"):
        needle_questions(checkpoint=folder, length=260, depth=0.5, samples=2, seed=1)
    assert needle_questions(checkpoint=folder, length=264, depth=0.5, samples=2, seed=1)


def test_a_model_without_an_indexer_is_never_vacuous(tmp_path):
    folder = save_checkpoint(tmp_path / "final", CONFIG.replace(layers=("gqa",), index_topk=64))
    assert len(mqar_questions(checkpoint=folder, length=256, pairs=4, samples=2, seed=1)["test"]) == 8


class LookupLM(LM):
    """Answer by looking the key up in the context; wrongly for keys before N."""

    def generate_until(self, requests):
        answers = []
        for request in requests:
            context, _ = request.args
            answer = re.search(re.escape(context[-2:]) + "(.)", context).group(1)
            answers.append("?" if context[-1] < "N" else answer + "!")
        return answers

    loglikelihood = loglikelihood_rolling = None


@pytest.mark.parametrize("task", ["mqar", "needle"])
def test_yaml_tasks_work_with_any_lm_eval_model(checkpoint, task):
    manager = TaskManager(
        include_path=str(TASK_FOLDER), include_defaults=False, metadata={"checkpoint": checkpoint, "samples": 40}
    )
    results = simple_evaluate(LookupLM(), tasks=[task], task_manager=manager, bootstrap_iters=0)
    samples = results["samples"][task]
    assert len(samples) == (320 if task == "mqar" else 40)
    share = sum(sample["doc"]["context"][-1] >= "N" for sample in samples) / len(samples)
    assert 0.2 < share < 0.8
    assert results["results"][task]["recall,none"] == pytest.approx(share)


def test_metadata_without_a_checkpoint():
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False)
    with pytest.raises(ConfigError, match="mqar: the metadata must name a checkpoint folder"):
        manager.load(["mqar"])
