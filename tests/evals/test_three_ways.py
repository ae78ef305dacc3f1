"""Each task in process, against a server, and in transformers: equal documents and, for equal weights, equal scores."""

from __future__ import annotations

import pytest
import torch
from listening_server import listening
from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from evals.documents import TASKS
from evals.lm import CheckpointLM
from evals.run import TASK_FOLDER
from evals.source import load_source
from model import checkpoint as checkpoints
from model.config import CACHE_FORMATS, ModelConfig
from model.hf import export_pretrained
from model.tokenizer import ByteTokenizer
from model.transformer import Transformer
from serve.engine import Engine

CONFIG = ModelConfig(
    hidden_size=64,
    layers=("sliding", "csa", "hca"),
    max_positions=512,
    window=8,
    hca_ratio=16,
    index_topk=4,
    index_heads=16,  # with few heads, many entries tie at a score of 0
    init_std=0.15,
    zero_init_output=False,
    qat=False,
    **dict.fromkeys(CACHE_FORMATS, "fp32"),
)
LENGTH = 200


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save equal weights as a checkpoint of this project and of transformers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ways")
    model = Transformer(CONFIG).eval()
    with torch.no_grad():
        model.head.weight[:34] = model.head.weight[129:] = 0.0  # printable ASCII only, and no EOS
    checkpoints.save(model, folder / "final", ByteTokenizer())
    export_pretrained(model, folder / "transformers", tokenizer=ByteTokenizer())
    return folder / "final", folder / "transformers"


def run(model, tasks, /, **metadata):
    """Return {task: (document, responses) per question} and {task: metrics}."""
    metadata = {"length": LENGTH, "samples": 16, "pairs": 3, "keys": 5, "items": 4, **metadata}
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata=metadata)
    results = simple_evaluate(model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0)
    answers = {
        task: [(sample["doc"], sample["resps"][0][0]) for sample in samples]
        for task, samples in results["samples"].items()
    }
    return answers, results["results"]


@pytest.fixture(scope="module")
def in_process(folders):
    native, _ = folders
    return run(CheckpointLM(native), TASKS, checkpoint=str(native))


def check_equal(found, expected):
    answers, metrics = found
    expected_answers, expected_metrics = expected
    assert set(answers) == set(TASKS)
    for task, questions in answers.items():
        assert len(questions) >= 16
        for (document, response), (expected_document, expected_response) in zip(
            questions, expected_answers[task], strict=True
        ):
            assert document == expected_document
            if TASKS[task].metric == "recall":
                size = len(document["answer"])  # rounding may decide between equally likely tokens further on
                assert len(expected_response) == 11
                assert response[:size] == expected_response[:size], task
            else:
                assert response[0] == pytest.approx(expected_response[0], abs=1e-2)
        for name, value in expected_metrics[task].items():
            if name.endswith(",none") and isinstance(value, float):
                assert metrics[task][name] == pytest.approx(value, rel=1e-3, nan_ok=True), (task, name)


def test_a_server_gives_the_scores_of_the_process(folders, in_process):
    native, exported = folders
    with listening(Engine(checkpoints.load(native), ByteTokenizer()), name="ways") as server:
        arguments = {
            "base_url": f"{server.url}/v1/completions",
            "model": "ways",
            "tokenizer": str(exported),
            "tokenizer_backend": "huggingface",
            "add_bos_token": True,
            "max_length": CONFIG.max_positions,
        }
        check_equal(run(LocalCompletionsAPI(**arguments, num_concurrent=4), TASKS, **arguments), in_process)


def test_transformers_gives_the_scores_of_the_process(folders, in_process):
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs it")
    from lm_eval.models.huggingface import HFLM

    _, exported = folders
    arguments = {"pretrained": str(exported), "dtype": "float32"}
    check_equal(run(HFLM(**arguments, device="cpu", batch_size=1), TASKS, **arguments), in_process)


def test_the_exported_folder_gives_the_documents_of_the_checkpoint(folders):
    one, other = (load_source("mqar", {key: str(path)}) for key, path in zip(("checkpoint", "pretrained"), folders))
    assert one.stacked_windows == other.stacked_windows == 3 * 8
    assert one.config.index_topk == other.config.index_topk
    assert one.max_tokens == 512 and other.max_tokens == 501  # lm-eval's hf truncates without room for the answer
