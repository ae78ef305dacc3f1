"""Training of one trial, interrupted or not."""

import dataclasses
import json

import pytest

from model import checkpoint
from model.errors import ConfigError
from pipelines.experiments import scoring, trial_process
from pipelines.experiments.arms import Arm
from pipelines.experiments.trials import FINAL, LAST, RESULT, Result, Trial, plan
from pipelines.recipe.loading import with_overrides
from pipelines.tracking.mlflow_store import open_tracking
from pipelines.training.trainer import Trainer


@pytest.fixture
def start(prepared):
    """Start a parent run; return (settings of its trials, a function that plans a trial)."""

    def planned(seed, scored=None, **changes):
        recipe = with_overrides(prepared, {"train.checkpoint_every": 1, "tracking.system_metrics_interval": None,
                                           **changes})  # fmt: skip
        trial = plan(Arm("full", "all", recipe, scored or {}), seed, 1.0)
        trial.write()
        return trial

    parent = open_tracking(prepared).start_run("parent", kind="ablate", recipe=prepared)
    return {"uri": parent.uri, "parent": parent.run_id, "kind": "ablate_trial"}, planned


def timeless(curve):
    return [(tokens, {k: v for k, v in metrics.items() if "seconds" not in k}) for tokens, metrics in curve]


def test_a_killed_trial_goes_on_from_its_last_checkpoint(start, monkeypatch, prepared):
    tracking, planned = start
    whole = planned(5)
    trial_process.complete(whole, tracking)
    expected = whole.result()
    weights = checkpoint.load(whole.folder / FINAL).state_dict()
    whole.folder.rename(whole.folder.with_name("aside"))

    again = planned(5)
    made, update = [], Trainer.train_step

    def step_or_die(self, *arguments):
        if len(made) == 4:
            raise InterruptedError
        made.append(self.step)
        return update(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", step_or_die)
    with pytest.raises(InterruptedError):
        trial_process.complete(again, tracking)
    assert (again.folder / LAST).exists() and not again.is_finished
    monkeypatch.setattr(Trainer, "train_step", lambda self, *rest: made.append(self.step) or update(self, *rest))
    trial_process.complete(again, tracking)
    assert made == [0, 1, 2, 3, 4, 5]  # no step twice
    found = again.result()
    timeless = [
        [(t, {k: v for k, v in m.items() if "seconds" not in k}) for t, m in r.curve] for r in (expected, found)
    ]
    assert timeless[0] == timeless[1]
    for key, tensor in checkpoint.load(again.folder / FINAL).state_dict().items():
        assert tensor.equal(weights[key]), key
    client = open_tracking(prepared).client
    runs = client.search_runs([open_tracking(prepared).experiment_id],
                              f"tags.`mlflow.parentRunId` = '{tracking['parent']}'")  # fmt: skip
    assert len(runs) == 2 and {run.info.status for run in runs} == {"FINISHED"}
    made.clear()
    trial_process.complete(again, tracking)
    assert made == []  # a finished trial is reused


def test_a_trial_is_scored_on_the_tasks_of_its_own_experiment(start, monkeypatch):
    tracking, planned = start
    own = dataclasses.replace(planned(9), evaluated=True)
    planned(9)  # another experiment describes the same training, without tasks
    found = []
    monkeypatch.setattr(trial_process, "complete", lambda trial, tracking: found.append(trial))
    monkeypatch.setattr(Trial, "result", lambda self: Result("a", {"validation/loss": 1.0}, []))
    monkeypatch.setattr(trial_process.tune, "report", lambda metrics: None)
    trial_process.run_trial({"folder": str(own.folder)}, {str(own.folder): own.to_dict()}, tracking)
    assert found == [own]


def test_tasks_are_checked_with_as_many_samples_as_they_need(prepared):
    changes = {"evaluate.tasks": ["residue"], "evaluate.lengths": [128], "evaluate.samples": 64, "model.index_topk": 1}
    scoring.check_tasks(with_overrides(prepared, changes))
    with pytest.raises(
        ConfigError, match=r"evaluate\.samples: expected at least one document of each of 16 lengths of residue, found"
    ):
        scoring.check_tasks(with_overrides(prepared, {**changes, "evaluate.samples": 3}))


def test_the_seed_determines_weights_and_the_order_of_the_data(start):
    tracking, planned = start
    curves = []
    for seed in (6, 7):
        trial = planned(seed, **{"train.stages": [{"attention": "dense", "steps": 2}]})
        trial_process.complete(trial, tracking)
        curves.append(trial.result().line("validation/loss"))
    assert curves[0] != curves[1]
    assert [tokens for tokens, _ in curves[0]] == [2 * 8 * 96]


def test_a_network_is_scored_in_another_configuration_than_it_was_trained_in(start):
    tracking, planned = start
    changes = {"train.stages": [{"attention": "sparse", "steps": 3}], "model.qat": False}
    plain, scored = planned(8, **changes), planned(8, {"qat": True}, **changes)
    for trial in (plain, scored):
        trial_process.complete(trial, tracking)
    assert plain.result().curve[-1][1]["validation/loss"] == scored.result().curve[-1][1]["validation/loss"]
    assert plain.result().metrics["validation/loss"] != scored.result().metrics["validation/loss"]
    assert json.loads((scored.folder / RESULT).read_text())["run_id"] != plain.result().run_id
