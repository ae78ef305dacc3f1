"""Evaluation of a checkpoint: metrics, standard errors, and refused arguments."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from retrieval_data import write_shards

from evals.documents import TASKS
from evals.run import evaluate
from model.errors import CheckpointError, ConfigError, DataError
from model.tokenizer import ByteTokenizer

FOUR = {"mqar": {"pairs": 4}}


def test_evaluate_names_its_metrics(checkpoint):
    metrics = evaluate(checkpoint, lengths=[128, 256], depths=[0.0, 0.5], samples=5, settings=FOUR)
    settings = [f"{name}/{n}" for n in (128, 256) for name in ("mqar",)]
    settings += [f"needle/{n}/{depth}" for n in (128, 256) for depth in ("0", "0.5")]
    names = {f"eval/{s}/{part}" for s in settings for part in ("recall", "recall_stderr", "questions", "documents")}
    assert set(metrics) == names | {"eval/recall"}
    assert metrics["eval/recall"] == metrics["eval/mqar/128/recall"]
    assert metrics["eval/mqar/256/questions"] == 20
    assert metrics["eval/mqar/256/documents"] == 5
    assert metrics["eval/needle/256/0.5/questions"] == 5
    assert all(metrics[f"eval/{setting}/recall"] < 0.5 for setting in settings)  # the model is untrained
    assert evaluate(checkpoint, lengths=[128, 256], depths=[0.0, 0.5], samples=5, settings=FOUR) == metrics


def test_every_task_is_evaluated(checkpoint):
    metrics = evaluate(checkpoint, list(TASKS), lengths=[300, 320], depths=[0.5], samples=32)
    for task, made in TASKS.items():
        setting = f"eval/{task}/300" + "/0.5" * made.per_depth
        assert 0 <= metrics[f"{setting}/{made.metric}"] < 0.5
        assert metrics[f"{setting}/{made.metric}_stderr"] >= 0
        assert metrics[f"{setting}/documents"] == 32
    assert metrics["eval/residue/300/worst_recall"] <= metrics["eval/residue/300/recall"]
    # An untrained model predicts bytes almost uniformly, at any length.
    assert 200 < metrics["eval/perplexity/300/0.5/perplexity"] < 320
    assert metrics["eval/perplexity/effective_length"] == 320
    assert "eval/mqar/effective_length" not in metrics  # no better than chance


def test_effective_length_needs_several_lengths(checkpoint):
    assert not any("effective" in name for name in evaluate(checkpoint, ["perplexity"], samples=2, depths=[1.0]))


def test_settings_of_tasks_and_distance(checkpoint):
    scores = evaluate(checkpoint, ["mqar"], [256], samples=3, settings={"mqar": {"pairs": 5}}, distance=100)
    assert scores["eval/mqar/256/questions"] == 15
    with pytest.raises(ConfigError, match=r"^distance: 47 proves nothing, because 3 stacked windows of 16 tokens"):
        evaluate(checkpoint, ["mqar"], [256], samples=3, distance=47)


def test_evaluate_refuses_invalid_arguments(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match=r"^tasks: 'hellaswag' is not one of mqar, needle, .*, perplexity$"):
        evaluate(checkpoint, ["mqar", "hellaswag"])
    with pytest.raises(ConfigError, match=r"^lengths: .* without duplicates"):
        evaluate(checkpoint, lengths=[256, 256])
    with pytest.raises(ConfigError, match=r"^mqar\.keys: is not one of its settings \(pairs\)"):
        evaluate(checkpoint, settings={"mqar": {"keys": 3}})
    with pytest.raises(ConfigError, match=r"^needle\.depth: is set by depths"):
        evaluate(checkpoint, settings={"needle": {"depth": 0.3}})
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no validation shards found"):
        evaluate(checkpoint, data_folder=tmp_path)


def test_damaged_and_short_shards_are_named(checkpoint, tmp_path):
    short = write_shards(tmp_path / "short", ["few words"], ByteTokenizer())
    with pytest.raises(DataError, match="expected text for documents of 256 tokens, found"):
        evaluate(checkpoint, data_folder=short)
    (tmp_path / "short" / "validation" / "00000.parquet").write_bytes(b"PAR1 no longer")
    with pytest.raises(DataError, match=r"00000\.parquet: damaged token shard"):
        evaluate(checkpoint, data_folder=short)
    pq.write_table(pa.table({"tokens": [1, 2]}), tmp_path / "short" / "validation" / "00000.parquet")
    with pytest.raises(DataError, match=r"00000\.parquet: .* 'kind'"):
        evaluate(checkpoint, data_folder=short)
