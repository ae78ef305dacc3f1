"""lm-eval's command line with checkpoints of this project: own tasks, and tasks of every output type."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager

from evals.__main__ import main
from evals.documents import TASKS
from evals.lm import CheckpointLM
from model import checkpoint as checkpoints
from model.config import ModelConfig
from model.tokenizer import ByteTokenizer
from model.transformer import Transformer

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    {"text": "the cat sat on the", "choices": [" mat", " moon"], "answer": 0, "target": " mat"},
    {"text": "two and two are", "choices": [" five", " four"], "answer": 1, "target": " four"},
    {"text": "rain falls from", "choices": [" roofs", " clouds"], "answer": 1, "target": " clouds"},
]
STOCK = {
    "loglikelihood": {
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{target}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "multiple_choice": {
        "doc_to_text": "{{text}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "loglikelihood_rolling": {
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "generate_until": {
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cli") / "final"
    config = ModelConfig(hidden_size=32, layers=("sliding", "csa", "hca"), max_positions=512, init_std=0.15)
    checkpoints.save(Transformer(config), folder, ByteTokenizer())
    return folder


@pytest.fixture(autouse=True)
def own_tasks_only(monkeypatch):
    """Leave out lm-eval's 14,000 tasks, which take seconds to list."""
    start = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, *args, **more: start(self, *args, **{**more, "include_defaults": False})
    )
    monkeypatch.chdir(ROOT)


def results_of(folder):
    [path] = folder.rglob("results_*.json")
    return json.loads(path.read_text())


def samples_of(folder, task):
    [path] = folder.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tasks_by_name_with_settings_of_model_and_task(folder, tmp_path, monkeypatch):
    built = []
    start = CheckpointLM.__init__
    monkeypatch.setattr(CheckpointLM, "__init__", lambda self, **given: (built.append(given), start(self, **given))[1])
    arguments = ["run", "--include_path", "evals/tasks", "--tasks", "mqar,needle,perplexity", "--model", "fiftyfold"]
    arguments += ["--model_args", f"checkpoint={folder},prefill_chunk=64,batch_tokens=1000", "--device", "cpu"]
    arguments += ["--batch_size", "3", "--metadata", '{"length": 160, "samples": 3, "pairs": 4, "depth": 0.8}']
    arguments += ["--output_path", str(tmp_path), "--log_samples"]
    monkeypatch.setattr(sys, "argv", ["evals", *arguments])
    assert main() == 0
    assert built == [
        {"checkpoint": str(folder), "prefill_chunk": 64, "batch_tokens": 1000, "batch_size": "3", "device": "cpu"}
    ]
    results = results_of(tmp_path)
    assert set(results["results"]) == {"mqar", "needle", "perplexity"}
    assert results["configs"]["needle"]["metadata"]["depth"] == 0.8
    assert 0 <= results["results"]["mqar"]["recall,none"] <= 1
    assert results["results"]["mqar"]["recall_standard_error,none"] >= 0
    assert len(samples_of(tmp_path, "mqar")) == 12
    assert len(samples_of(tmp_path, "needle")[0]["doc"]["context"]) == 158


def test_lm_eval_itself_runs_tasks_by_file(folder, tmp_path, monkeypatch):
    """The plain command knows the model once a task file is named by its path."""
    arguments = ["run", "--tasks", "evals/tasks/mqar.yaml", "--model", "fiftyfold"]
    arguments += ["--model_args", f"checkpoint={folder}", "--metadata", '{"length": 160, "samples": 2, "pairs": 3}']
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--output_path", str(tmp_path), "--batch_size", "auto"])
    cli_evaluate()
    assert 0 <= results_of(tmp_path)["results"]["mqar"]["recall,none"] <= 1


def test_tasks_of_every_output_type(folder, tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for kind, content in STOCK.items():
        task = {
            "task": f"stock_{kind}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": kind,
            **content,
        }
        (tmp_path / f"{kind}.yaml").write_text(json.dumps(task))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = ["run", "--include_path", str(tmp_path), "--tasks", ",".join(f"stock_{kind}" for kind in STOCK)]
    arguments += [
        "--model",
        "fiftyfold",
        "--model_args",
        f"checkpoint={folder}",
        "--output_path",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", ["evals", *arguments, "--log_samples", "--batch_size", "auto"])
    assert main() == 0
    out = tmp_path / "out"
    results = results_of(out)["results"]

    def log_probability(context, text):
        """By a full forward pass."""
        model, tokenizer = checkpoints.load(folder), ByteTokenizer()
        ids = tokenizer.encode_prompt(context + text)
        start = len(tokenizer.encode_prompt(context))
        with torch.inference_mode():
            scores = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)[start - 1 :]
        return scores.gather(1, torch.tensor(ids[start:])[:, None]).sum().item()

    # The cache quantizes, so scores of a chunked prefill differ slightly from those of one pass.
    near = {"rel": 0.05}
    totals = [log_probability(document["text"], document["target"]) for document in DOCUMENTS]
    assert results["stock_loglikelihood"]["perplexity,none"] == pytest.approx(math.exp(-sum(totals) / 3), rel=0.2)
    for sample, document in zip(samples_of(out, "stock_multiple_choice"), DOCUMENTS):
        for response, choice in zip(sample["resps"], document["choices"], strict=True):
            assert float(response[0][0]) == pytest.approx(log_probability(document["text"], choice), **near)
    rolling = sum(log_probability("", document["text"]) for document in DOCUMENTS)
    size = sum(len(document["text"]) for document in DOCUMENTS)
    found = results["stock_loglikelihood_rolling"]
    assert found["bits_per_byte,none"] == pytest.approx(-rolling / size / math.log(2), **near)
    assert all(len(sample["resps"][0][0]) <= 5 for sample in samples_of(out, "stock_generate_until"))
    assert results["stock_generate_until"]["exact_match,none"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "ruler"], f"Tasks not found: ruler; evals/tasks has {', '.join(TASKS)}"),
        (
            ["--tasks", "mqar", "--metadata", '{"length": 9999}'],
            "length: 9999 exceeds the model's context",
        ),
        (
            ["--tasks", "mqar", "--metadata", '{"length": "long"}'],
            "length: expected a whole number of at least 1, found 'long'",
        ),
        (["--tasks", "mqar", "--metadata", '{"pairs": 1}'], "mqar.pairs: must be from 2 to 26, found 1"),
        (["--tasks", "mqar", "--batch_size", "0"], "batch_size: expected a number of prompts or auto, found"),
        (["--tasks", "mqar", "--device", "gpu9"], "device: 'gpu9' is not a device of PyTorch"),
    ],
)
def test_errors_are_one_sentence(folder, monkeypatch, capsys, arguments, message):
    given = ["run", "--include_path", "evals/tasks", "--model", "fiftyfold", "--model_args", f"checkpoint={folder}"]
    monkeypatch.setattr(sys, "argv", ["evals", *given, *arguments])
    assert main() == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: {message}")
