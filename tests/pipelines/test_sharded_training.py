"""Sharded training against replicated and single-process training."""

import json
import os
import random
import shutil
import threading

import pytest
import torch
from gloo import on_ranks
from plain_training import Record, trainer_for
from sharded_ranks import AT, SHARDED, three_ranks, trained, two_ranks
from test_exact_resume import history, indexed_steps, processes_below, wait_for_checkpoint

from model import checkpoint
from model.errors import CheckpointError, FiftyfoldError
from pipelines.recipe.loading import with_overrides
from pipelines.steps import train
from pipelines.tracking.registry import weights_digest
from pipelines.training.train_state import OPTIMIZER

STAGES = [
    {"attention": "dense", "steps": 1, "qat": False},
    {"attention": "indexer_warmup", "steps": 1, "indexer_learning_rate": 1e-3},
    {"attention": "sparse", "steps": 2},
]


@pytest.fixture(scope="module")
def recipe(prepared):
    return with_overrides(
        prepared,
        {"model.layers": ["kda", "csa", "hca", "mamba2"],
         "model.mixer_options": {"mamba2": {"head_dim": 8, "state_size": 6, "n_groups": 2, "chunk_size": 16},
                                 "kda": {"head_dim": 16, "chunk_size": 16}},
         "model.mtp_layers": 1, "train.stages": STAGES, "train.batch_rows": 12, "train.accumulation_steps": 2,
         "train.checkpoint_every": 1, "train.validate_every": 4, "train.validation_rows": 13},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    trained(recipe, folder / "one")
    on_ranks(2, two_ranks, recipe.to_dict(), folder)
    on_ranks(3, three_ranks, recipe.to_dict(), folder)
    trained(recipe, folder / "one-from-two", source=folder / "clipped-shards" / AT)
    return folder


def records(folder):
    """Return (logged, reported), each {step: metrics}."""
    return [dict(map(tuple, part)) for part in json.loads((folder / "record.json").read_text())]


def weights(folder):
    return checkpoint.load(folder).state_dict()


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("changes", ["plain", "rolled-back"])
def test_shards_train_as_replicas_do_to_the_last_bit(folder, changes):
    shards, replicas = records(folder / f"{changes}-shards"), records(folder / f"{changes}-replicas")
    for metrics, others in zip(shards[0].values(), replicas[0].values()):
        assert metrics.pop("train/grad_norm") == pytest.approx(others.pop("train/grad_norm"), rel=1e-5)
    assert shards == replicas and set(shards[0]) == {1, 2, 3, 4}
    assert_equal(*(weights(folder / f"{changes}-{kind}" / "4") for kind in ("shards", "replicas")))


@pytest.mark.parametrize(("changes", "tolerance"), [("clipped", 1e-3), ("narrow", 1e-2)])
def test_clipped_and_narrow_shards_train_as_replicas_do(folder, changes, tolerance):
    for step, metrics in records(folder / f"{changes}-shards")[0].items():
        expected = records(folder / f"{changes}-replicas")[0][step]
        assert set(metrics) == set(expected)
        for name, value in metrics.items():
            # The indexer's loss is small, so the last bit of a sum moves its weights most.
            bound = 3e-3 if name.endswith("indexer_kl") and changes == "clipped" else tolerance
            assert value == pytest.approx(expected[name], rel=bound), (step, name)


def test_a_sharded_run_resumes_to_the_last_bit(folder):
    for found, expected in zip(records(folder / "resumed"), records(folder / "clipped-shards")):
        assert found == {step: metrics for step, metrics in expected.items() if step > int(AT)}
    assert_equal(weights(folder / "resumed" / "4"), weights(folder / "clipped-shards" / "4"))


def test_the_digest_covers_every_rank(folder, tmp_path):
    shutil.copytree(folder / "clipped-shards" / AT, tmp_path / AT)
    before = weights_digest(tmp_path / AT)
    cut_short(tmp_path / AT, "model-rank-00002-of-00002.safetensors")
    assert weights_digest(tmp_path / AT) != before


@pytest.mark.parametrize(
    ("name", "source"),
    [("resumed", "clipped-shards"), ("two-from-one", "one"), ("one-from-two", "clipped-shards"),
     ("three-from-two", "clipped-shards")],
)  # fmt: skip
def test_a_checkpoint_is_the_same_on_any_number_of_ranks(folder, name, source):
    for file in (checkpoint.WEIGHTS, OPTIMIZER):
        found, expected = (checkpoint.read_tensors(f, file) for f in (folder / name / "loaded", folder / source / AT))
        assert_equal(found, expected)
    for step, metrics in records(folder / name)[0].items():
        assert metrics["train/loss"] == pytest.approx(records(folder / source)[0][step]["train/loss"], rel=1e-3)


def other_save(folder, part):
    shutil.copyfile(folder.parent / "4" / part, folder / part)


def cut_short(folder, part):
    (folder / part).write_bytes((folder / part).read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "message"),
    [(other_save, "belongs to another save"), (cut_short, "damaged"), (lambda f, part: (f / part).unlink(), "No such")],
)
@pytest.mark.parametrize("part", ["model-rank-00002-of-00002.safetensors", "optimizer-rank-00001-of-00002.safetensors"])
def test_half_a_checkpoint_is_none(folder, recipe, tmp_path, part, damage, message):
    copy = tmp_path / "run" / AT
    shutil.copytree(folder / "clipped-shards", tmp_path / "run")
    damage(copy, part)
    with pytest.raises(CheckpointError, match=f"{part}.*{message}"):
        trainer_for(recipe, Record()).load_checkpoint(copy)
    if part.startswith("model"):
        with pytest.raises(CheckpointError, match=f"{part}.*{message}"):
            checkpoint.load(copy)


@pytest.mark.long
def test_a_sharded_run_that_died_goes_on_in_one_worker(prepared, ray_cluster):
    sharded = with_overrides(
        prepared,
        {"run.name": "sharded", "train.workers": 2, **SHARDED, "train.max_failures": 0, "train.validate_every": 30,
         "train.stages": [{"attention": "sparse", "steps": 30}], "train.stability.spike": None},
    )  # fmt: skip

    def kill():
        wait_for_checkpoint(sharded, 4)
        random.choice(processes_below(os.getpid(), "RayTrainWorker")).kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(FiftyfoldError):
        train.run(sharded)
    killer.join()
    last = max(indexed_steps(sharded))
    written = sorted(f.name for f in (sharded.run_folder / "train" / f"step_{last:06d}").glob("*.safetensors"))
    assert written == [f"{name}-rank-0000{n}-of-00002.safetensors" for name in ("model", "optimizer") for n in (1, 2)]
    result = train.run(with_overrides(sharded, {"train.workers": 1, "train.sharding": "none"}))
    steps = [step for step, _ in history(sharded)]
    assert last < 30 and steps[last - 30 :] == list(range(last + 1, 31)) and set(steps) == set(range(1, 31))
    assert not list(result.checkpoint.glob("*-of-*")) and checkpoint.load(result.checkpoint).config == sharded.model
