"""The retrieval tasks: what is asked, that it can be answered, and that vacuous settings are refused."""

from __future__ import annotations

import re
import statistics
import string

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from evals.documents.retrieval import KEYS
from evals.run import TASK_FOLDER, _summary, evaluate
from evals.tasks.generators import QUESTION, mqar_questions, needle_questions
from model import checkpoint as checkpoints
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError, DataError
from model.tokenizer import ByteTokenizer, load_tokenizer
from model.transformer import Transformer

CONFIG = ModelConfig(hidden_size=32, layers=("sliding", "csa", "hca"), max_positions=1024)


def save(folder, config=CONFIG, tokenizer=None):
    torch.manual_seed(0)
    checkpoints.save(Transformer(config), folder, tokenizer or ByteTokenizer())
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "final")


def shards(folder, texts, tokenizer):
    """A data folder as the prepare step writes it, with a retrieval document that must not become a filler."""
    (folder / "validation").mkdir(parents=True)
    tokenizer.save(folder)
    rows = [("text", [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]) for text in texts]
    rows.append(("mqar", [tokenizer.bos_id, *tokenizer.encode("!retrieval! @A1 " * 500)]))
    table = {"kind": [kind for kind, _ in rows], "tokens": pa.array([t for _, t in rows], pa.list_(pa.int32()))}
    pq.write_table(pa.table(table), folder / "validation" / "00000.parquet")
    return str(folder)


def check_questions(questions, tokenizer, length, window):
    """Each question asks for the one fact of its key, which ends at least ``window`` tokens before."""
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


def test_needle_stands_at_its_depth(checkpoint):
    def place(depth):
        questions = needle_questions(checkpoint=checkpoint, length=512, depth=depth, samples=8, seed=1)["test"]
        assert set(check_questions(questions, ByteTokenizer(), 512, CONFIG.window)) == {512}
        return {q["context"].index(q["context"][-2:]) for q in questions}

    # 512 tokens hold BOS, the needle, its question and its value; the deepest needle ends a window before the question.
    last = 512 - 1 - 2 * 3 - CONFIG.window
    assert place(0.0) == {0}
    assert place(0.5) == {round(0.5 * last)}
    assert place(1.0) == {last}


def test_equal_seeds_give_equal_documents(checkpoint):
    def contexts(seed, samples=3):
        made = mqar_questions(checkpoint=checkpoint, length=256, pairs=4, samples=samples, seed=seed)
        return made["test"]["context"][:12]

    assert contexts(1) == contexts(1)
    assert contexts(1) == contexts(1, samples=5)  # more samples go on, they do not start over
    assert contexts(1) != contexts(2)


def test_filler_is_the_validation_text(checkpoint, tmp_path):
    false_facts = " ".join(f"@{key}0" for key in KEYS)
    data = shards(tmp_path, [f"alpha beta gamma delta. {false_facts} " * 20], ByteTokenizer())
    questions = mqar_questions(checkpoint=checkpoint, length=256, pairs=4, samples=8, seed=1, data=data)["test"]
    check_questions(questions, ByteTokenizer(), 256, CONFIG.window)
    text = "".join(questions["context"])
    assert "alpha beta" in text
    assert "retrieval" not in text


def test_text_whose_characters_take_several_bytes(checkpoint, tmp_path):
    """Cutting such text anywhere breaks characters; what the model reads must be valid text of the right length."""
    data = shards(tmp_path, ["长上下文记忆检索测试。" * 300], ByteTokenizer())
    questions = mqar_questions(checkpoint=checkpoint, length=256, pairs=4, samples=4, seed=1, data=data)["test"]
    sizes = check_questions(questions, ByteTokenizer(), 256, CONFIG.window)
    assert max(sizes) > 230


def test_another_tokenizer(tmp_path):
    """Merges over the edges of a fact change how many tokens a document has, not what it asks."""
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
    checkpoint = save(tmp_path / "final", CONFIG.replace(vocab_size=tokenizer.vocab_size), tokenizer)
    questions = mqar_questions(checkpoint=checkpoint, length=256, pairs=4, samples=6, seed=1)["test"]
    sizes = check_questions(questions, tokenizer, 256, CONFIG.window)
    assert max(sizes) > 230
    assert len(questions["context"][0]) > 300  # characters: the lengths are counted in this tokenizer's tokens


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
        return save(tmp_path / name, CONFIG, load_tokenizer(tmp_path / f"{name}.json"))

    plain = characters("plain", string.printable)
    assert len(mqar_questions(checkpoint=plain, length=1024, pairs=20, samples=1, seed=1)["test"]) == 20
    without_at = characters("without_at", string.printable.replace("@", ""))
    folds_case = characters("folds_case", string.printable, normalizers.Lowercase())  # two facts of one key
    for folder in (without_at, folds_case):
        with pytest.raises(ConfigError, match="tokenizer: does not restore the text of the facts"):
            mqar_questions(checkpoint=folder, length=1024, pairs=20, samples=1, seed=1)


@pytest.mark.parametrize(
    ("changes", "length", "message"),
    [
        ({}, 40, "too few for 4 facts outside a window of 16"),
        ({"index_topk": 64}, 256, r"length 256 would be vacuous: \d+ compressed entries .* selects 64"),
        ({"csa_ratio": 32, "hca_ratio": 64}, 256, r"would be vacuous: [78] compressed entries"),
        ({"window": 250}, 256, "outside a window of 250"),
        ({}, 1025, "length 1025 exceeds the model's context of 1024"),
    ],
)
def test_vacuous_settings_are_refused(tmp_path, changes, length, message):
    folder = save(tmp_path / "final", CONFIG.replace(**changes))
    with pytest.raises(ConfigError, match=message):
        mqar_questions(checkpoint=folder, length=length, pairs=4, samples=2, seed=1)
    with pytest.raises(ConfigError):
        evaluate(folder, ["mqar"], [length], samples=2, pairs=4)


def test_needle_refuses_too(tmp_path):
    folder = save(tmp_path / "final", CONFIG.replace(index_topk=64))
    with pytest.raises(ConfigError, match="needle: length 256 would be vacuous: 63 compressed entries"):
        needle_questions(checkpoint=folder, length=256, depth=0.5, samples=2, seed=1)
    # One block of tokens more, and the indexer has to leave one entry out.
    with pytest.raises(ConfigError, match="64 compressed entries"):
        needle_questions(checkpoint=folder, length=260, depth=0.5, samples=2, seed=1)
    assert needle_questions(checkpoint=folder, length=264, depth=0.5, samples=2, seed=1)


def test_a_model_without_an_indexer_is_asked_all_the_same(tmp_path):
    folder = save(tmp_path / "final", CONFIG.replace(layers=("gqa",), index_topk=64))
    assert len(mqar_questions(checkpoint=folder, length=256, pairs=4, samples=2, seed=1)["test"]) == 8


class Reader(LM):
    """Answers by looking the key up in the text, as a perfect memory would; wrongly for keys before N."""

    def generate_until(self, requests):
        answers = []
        for request in requests:
            context, _ = request.args
            answer = re.search(re.escape(context[-2:]) + "(.)", context).group(1)
            answers.append("?" if context[-1] < "N" else answer + "!")
        return answers

    loglikelihood = loglikelihood_rolling = None


@pytest.mark.parametrize("task", ["mqar", "needle"])
def test_yaml_tasks_work_with_any_model_of_lm_eval(checkpoint, task):
    manager = TaskManager(
        include_path=str(TASK_FOLDER), include_defaults=False, metadata={"checkpoint": checkpoint, "samples": 40}
    )
    results = simple_evaluate(Reader(), tasks=[task], task_manager=manager, bootstrap_iters=0)
    samples = results["samples"][task]
    assert len(samples) == (320 if task == "mqar" else 40)
    share = sum(sample["doc"]["context"][-1] >= "N" for sample in samples) / len(samples)
    assert 0.2 < share < 0.8
    assert results["results"][task]["recall,none"] == pytest.approx(share)


def test_evaluate_names_its_metrics(checkpoint):
    metrics = evaluate(checkpoint, lengths=[128, 256], depths=[0.0, 0.5], samples=5, pairs=4)
    settings = [f"{name}/{n}" for n in (128, 256) for name in ("mqar",)]
    settings += [f"needle/{n}/{depth}" for n in (128, 256) for depth in ("0", "0.5")]
    names = {f"eval/{s}/{part}" for s in settings for part in ("recall", "recall_stderr", "questions", "documents")}
    assert set(metrics) == names | {"eval/recall"}
    assert metrics["eval/recall"] == metrics["eval/mqar/128/recall"]
    assert metrics["eval/mqar/256/questions"] == 20
    assert metrics["eval/mqar/256/documents"] == 5
    assert metrics["eval/needle/256/0.5/questions"] == 5
    assert all(metrics[f"eval/{setting}/recall"] < 0.5 for setting in settings)  # an untrained model knows nothing
    assert evaluate(checkpoint, lengths=[128, 256], depths=[0.0, 0.5], samples=5, pairs=4) == metrics


def test_standard_error_counts_documents_not_questions():
    scores = {0: [1, 1], 1: [1, 1], 2: [0, 0], 3: [0, 1]}
    samples = [{"doc": {"document": d}, "recall": float(r)} for d, rs in scores.items() for r in rs]
    expected = statistics.stdev([1, 1, 0, 0.5]) / 2
    assert _summary(samples) == {
        "recall": 0.625,
        "recall_stderr": pytest.approx(expected),
        "questions": 8,
        "documents": 4,
    }
    assert "recall_stderr" not in _summary(samples[:2])


def test_evaluate_refuses_what_it_does_not_know(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="'hellaswag' is not one of mqar, needle"):
        evaluate(checkpoint, ["mqar", "hellaswag"])
    with pytest.raises(ConfigError, match=r"^lengths: .* without duplicates"):
        evaluate(checkpoint, lengths=[256, 256])
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no validation shards"):
        evaluate(checkpoint, data_folder=tmp_path)


def test_damaged_and_short_shards_are_named(checkpoint, tmp_path):
    short = shards(tmp_path / "short", ["few words"], ByteTokenizer())
    with pytest.raises(DataError, match="too few for documents of 256 tokens"):
        evaluate(checkpoint, data_folder=short)
    (tmp_path / "short" / "validation" / "00000.parquet").write_bytes(b"PAR1 no longer")
    with pytest.raises(DataError, match=r"00000\.parquet: damaged token shard"):
        evaluate(checkpoint, data_folder=short)
    pq.write_table(pa.table({"tokens": [1, 2]}), tmp_path / "short" / "validation" / "00000.parquet")
    with pytest.raises(DataError, match=r"00000\.parquet: .* 'kind'"):
        evaluate(checkpoint, data_folder=short)


def test_metadata_without_a_checkpoint():
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False)
    with pytest.raises(ConfigError, match="mqar: the metadata must name a checkpoint folder"):
        manager.load(["mqar"])
