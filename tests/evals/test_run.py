"""Evaluation of a checkpoint: metrics, standard errors, and refused arguments."""

from __future__ import annotations

import statistics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from retrieval_data import write_shards

from evals.run import _summarize, evaluate
from model.errors import CheckpointError, ConfigError, DataError
from model.tokenizer import ByteTokenizer


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
    assert all(metrics[f"eval/{setting}/recall"] < 0.5 for setting in settings)  # the model is untrained
    assert evaluate(checkpoint, lengths=[128, 256], depths=[0.0, 0.5], samples=5, pairs=4) == metrics


def test_standard_error_counts_documents_not_questions():
    scores = {0: [1, 1], 1: [1, 1], 2: [0, 0], 3: [0, 1]}
    samples = [{"doc": {"document": d}, "recall": float(r)} for d, rs in scores.items() for r in rs]
    expected = statistics.stdev([1, 1, 0, 0.5]) / 2
    assert _summarize(samples) == {
        "recall": 0.625,
        "recall_stderr": pytest.approx(expected),
        "questions": 8,
        "documents": 4,
    }
    assert "recall_stderr" not in _summarize(samples[:2])


def test_evaluate_refuses_invalid_arguments(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match=r"^tasks: 'hellaswag' is not one of mqar, needle"):
        evaluate(checkpoint, ["mqar", "hellaswag"])
    with pytest.raises(ConfigError, match=r"^lengths: .* without duplicates"):
        evaluate(checkpoint, lengths=[256, 256])
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no validation shards found"):
        evaluate(checkpoint, data_folder=tmp_path)


def test_damaged_and_short_shards_are_named(checkpoint, tmp_path):
    short = write_shards(tmp_path / "short", ["few words"], ByteTokenizer())
    with pytest.raises(DataError, match="too few for documents of 256 tokens"):
        evaluate(checkpoint, data_folder=short)
    (tmp_path / "short" / "validation" / "00000.parquet").write_bytes(b"PAR1 no longer")
    with pytest.raises(DataError, match=r"00000\.parquet: damaged token shard"):
        evaluate(checkpoint, data_folder=short)
    pq.write_table(pa.table({"tokens": [1, 2]}), tmp_path / "short" / "validation" / "00000.parquet")
    with pytest.raises(DataError, match=r"00000\.parquet: .* 'kind'"):
        evaluate(checkpoint, data_folder=short)
